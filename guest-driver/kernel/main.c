// SPDX-License-Identifier: GPL-2.0
/*
 * dmbridge: direct memory buffers between the virtual machines of a host.
 *
 * This file finds a device, starts it, and ends it. docs/device.md is the contract.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/io.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/version.h>
#include <linux/virtio_config.h>
#include "dmbridge.h"

static bool map = true;
module_param(map, bool, 0444);
MODULE_PARM_DESC(map, "use the window where there is one; without, all data is moved");

static int read_config(struct virtio_device *vdev, struct dmbridge_config *config)
{
	virtio_cread_bytes(vdev, 0, config, sizeof(*config));
	if (memcmp(config->magic, DMBRIDGE_MAGIC, sizeof(config->magic)) ||
	    le16_to_cpu(config->version_major) != DMBRIDGE_VERSION_MAJOR)
		return -ENODEV;
	return 0;
}

/* Other devices have these IDs as well, so the magic decides, before anything else. */
static int dmbridge_validate(struct virtio_device *vdev)
{
	struct virtio_shm_region region;
	struct dmbridge_config config;

	if (!virtio_has_feature(vdev, VIRTIO_F_VERSION_1) || read_config(vdev, &config))
		return -ENODEV;
	if (!map || !virtio_get_shm_region(vdev, &region, DMBRIDGE_WINDOW_SHMID))
		__virtio_clear_bit(vdev, DMBRIDGE_F_MAP);
	return 0;
}

static int check_config(struct dmbridge *dev)
{
	struct dmbridge_limits *limits = &dev->limits;
	struct device *log = &dev->vdev->dev;
	struct virtio_shm_region region;
	struct dmbridge_config config;
	int rc;

	rc = read_config(dev->vdev, &config);
	if (rc)
		return rc;
	limits->fabric_id = le16_to_cpu(config.fabric_id);
	limits->gid = dmbridge_gid_id(&config.gid);
	limits->move_queues = le16_to_cpu(config.move_queues);
	limits->max_dmb_size = le64_to_cpu(config.max_dmb_size);
	limits->max_dmbs = le32_to_cpu(config.max_dmbs);
	limits->max_segments = le32_to_cpu(config.max_segments);
	limits->max_move_size = le64_to_cpu(config.max_move_size);
	limits->window_size = le64_to_cpu(config.window_size);
	memcpy(limits->system_eid, config.system_eid, sizeof(limits->system_eid));
	memcpy(limits->copy_plan, config.copy_plan, sizeof(limits->copy_plan));
	if (!limits->gid || !limits->move_queues || !limits->max_dmbs ||
	    limits->max_dmbs > SZ_1M || limits->max_segments < DMBRIDGE_MOVE_PIECES ||
	    limits->max_move_size < PAGE_SIZE || le32_to_cpu(config.granule) != SZ_4K) {
		dev_err(log, "the device's configuration cannot be\n");
		return -EINVAL;
	}
	/* A 64-bit size of a DMB has to fit a size_t, and 1 GiB is beyond any need. */
	limits->max_dmb_size = min_t(u64, limits->max_dmb_size, SZ_1G);
	dev->can_ram = virtio_has_feature(dev->vdev, DMBRIDGE_F_RAM_DMB);
	dev->can_map = virtio_has_feature(dev->vdev, DMBRIDGE_F_MAP);
	dev->can_private_line = virtio_has_feature(dev->vdev, DMBRIDGE_F_PRIVATE_LINE);
	if (!dev->can_map)
		return 0;
	if (!virtio_get_shm_region(dev->vdev, &region, DMBRIDGE_WINDOW_SHMID) ||
	    region.len < limits->window_size || !limits->window_size ||
	    !IS_ALIGNED(region.addr, PAGE_SIZE)) {
		dev_err(log, "the device's window cannot be\n");
		return -EINVAL;
	}
	dev->window_phys = region.addr;
	dev->window = memremap(region.addr, limits->window_size, MEMREMAP_WB);
	return dev->window ? 0 : -ENOMEM;
}

static int find_queues(struct dmbridge *dev, struct virtqueue **vqs)
{
	unsigned int i, count = DMBRIDGE_MOVE_QUEUE + dev->move_queues;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
	struct virtqueue_info info[DMBRIDGE_MOVE_QUEUE + DMBRIDGE_MAX_MOVE_QUEUES] = {
		{ .name = "control", .callback = dmbridge_control_interrupt },
		{ .name = "event", .callback = dmbridge_events_interrupt },
	};

	for (i = DMBRIDGE_MOVE_QUEUE; i < count; i++)
		info[i].name = "move";
	return virtio_find_vqs(dev->vdev, count, vqs, info, NULL);
#else
	const char *names[DMBRIDGE_MOVE_QUEUE + DMBRIDGE_MAX_MOVE_QUEUES] = { "control", "event" };
	vq_callback_t *callbacks[DMBRIDGE_MOVE_QUEUE + DMBRIDGE_MAX_MOVE_QUEUES] = {
		dmbridge_control_interrupt, dmbridge_events_interrupt,
	};

	/* Who waits for a move looks, and is not told. */
	for (i = DMBRIDGE_MOVE_QUEUE; i < count; i++)
		names[i] = "move";
	return virtio_find_vqs(dev->vdev, count, vqs, callbacks, names, NULL);
#endif
}

/*
 * The device broke its contract, or does not answer. It is not asked for anything
 * any more, and who waits for it is told; binding the driver again starts anew.
 */
void dmbridge_break(struct dmbridge *dev, const char *why)
{
	if (test_and_set_bit(DMBRIDGE_BROKEN, &dev->state))
		return;
	if (!test_bit(DMBRIDGE_GOING, &dev->state))
		dev_err(&dev->vdev->dev, "the device is not used any more: %s\n", why);
	schedule_work(&dev->broken);
}

static void broken(struct work_struct *work)
{
	struct dmbridge *dev = container_of(work, struct dmbridge, broken);
	u64 peer, last = 0;
	u32 i;

	dmbridge_chardev_broken(dev);
	/* Connections with every peer end, because nobody can be woken any more. */
	for (i = 0; i < dev->limits.max_dmbs; i++) {
		spin_lock_irq(&dev->dmbs_lock);
		peer = dev->dmbs[i] ? dev->dmbs[i]->peer : 0;
		spin_unlock_irq(&dev->dmbs_lock);
		if (peer && peer != last)
			dmbridge_smc_gone(dev, peer);
		last = peer ?: last;
	}
}

/*
 * Waits for the work that is under way, which may use what has just been taken
 * away. More of it may come, and sees that it is gone.
 */
void dmbridge_flush(struct dmbridge *dev)
{
	/* In this order: the latter may have the device break. */
	flush_workqueue(dev->wq);
	flush_work(&dev->broken);
}

/*
 * The VMM stops the device when the virtual machine is paused, and when it is
 * reset. The device tells one from the other by this word (docs/device.md, 6.9).
 */
static int dmbridge_live(struct dmbridge *dev)
{
	__le64 addr;
	int rc;

	dev->lifeline = kzalloc(sizeof(*dev->lifeline), GFP_KERNEL);
	if (!dev->lifeline)
		return -ENOMEM;
	*dev->lifeline = cpu_to_le32(1);
	addr = cpu_to_le64(virt_to_phys(dev->lifeline));
	rc = dmbridge_command(dev, DMBRIDGE_LIFELINE, &addr, sizeof(addr), NULL, 0);
	/* An earlier device does not know it: then a pause is the end. */
	return rc == -EOPNOTSUPP ? 0 : rc;
}

/* Takes the device everything; afterwards, nothing of this driver runs on its behalf. */
static void dmbridge_reset(struct dmbridge *dev)
{
	set_bit(DMBRIDGE_BROKEN, &dev->state);
	if (dev->lifeline)
		WRITE_ONCE(*dev->lifeline, 0);
	virtio_reset_device(dev->vdev);
	cancel_delayed_work_sync(&dev->watchdog);
	dmbridge_flush(dev);
	dev->vdev->config->del_vqs(dev->vdev);
}

static void dmbridge_free(struct dmbridge *dev)
{
	kfree(dev->lifeline);
	if (dev->wq)
		destroy_workqueue(dev->wq);
	dmbridge_remotes_free(dev);
	dmbridge_moves_free(dev);
	dmbridge_dmbs_free(dev);
	dmbridge_events_free(dev);
	dmbridge_control_free(dev);
	if (dev->window)
		memunmap(dev->window);
	free_percpu(dev->stats);
	kfree(dev);
}

static int dmbridge_probe(struct virtio_device *vdev)
{
	struct virtqueue *vqs[DMBRIDGE_MOVE_QUEUE + DMBRIDGE_MAX_MOVE_QUEUES];
	struct dmbridge *dev;
	int rc;

	dev = kzalloc(sizeof(*dev), GFP_KERNEL);
	if (!dev)
		return -ENOMEM;
	dev->vdev = vdev;
	vdev->priv = dev;
	spin_lock_init(&dev->dmbs_lock);
	spin_lock_init(&dev->remotes_lock);
	spin_lock_init(&dev->control.lock);
	spin_lock_init(&dev->events.lock);
	mutex_init(&dev->control.mutex);
	init_completion(&dev->control.answered);
	INIT_LIST_HEAD(&dev->events.waiting);
	INIT_LIST_HEAD(&dev->paused);
	INIT_WORK(&dev->broken, broken);
	dmbridge_remotes_init(dev);

	dmbridge_dmbs_init(dev);

	rc = -ENOMEM;
	dev->stats = alloc_percpu(struct dmbridge_stats);
	dev->wq = alloc_ordered_workqueue("dmbridge", 0);
	if (!dev->stats || !dev->wq)
		goto fail;
	rc = check_config(dev);
	if (rc)
		goto fail;
	dev->move_queues = min3((unsigned int)dev->limits.move_queues, nr_cpu_ids,
				(unsigned int)DMBRIDGE_MAX_MOVE_QUEUES);
	rc = -ENOMEM;
	dev->dmbs = kvcalloc(dev->limits.max_dmbs, sizeof(*dev->dmbs), GFP_KERNEL);
	if (!dev->dmbs)
		goto fail;
	rc = find_queues(dev, vqs);
	if (rc)
		goto fail;
	rc = dmbridge_control_init(dev, vqs[DMBRIDGE_CONTROL_QUEUE]) ?:
	     dmbridge_events_init(dev, vqs[DMBRIDGE_EVENT_QUEUE]) ?:
	     dmbridge_moves_init(dev, vqs + DMBRIDGE_MOVE_QUEUE);
	if (rc)
		goto fail_queues;
	virtio_device_ready(vdev);
	dmbridge_events_start(dev);
	rc = dmbridge_live(dev);
	if (rc)
		goto fail_ready;
	dev_info(&vdev->dev, "device %016llx, %s\n", dev->limits.gid,
		 dev->can_map ? "mapped" : "moves only");
	rc = dmbridge_chardev_add(dev);
	if (rc)
		goto fail_ready;
	rc = dmbridge_smc_add(dev);
	if (rc)
		goto fail_chardev;
	return 0;

fail_chardev:
	dmbridge_chardev_remove(dev);
fail_ready:
	dmbridge_reset(dev);
	goto fail;
fail_queues:
	vdev->config->del_vqs(vdev);
fail:
	dmbridge_free(dev);
	return rc;
}

static void dmbridge_remove(struct virtio_device *vdev)
{
	struct dmbridge *dev = vdev->priv;

	set_bit(DMBRIDGE_GOING, &dev->state);
	/* The device answers until all is given back, or is known not to. */
	dmbridge_chardev_remove(dev);
	dmbridge_smc_remove(dev);
	dmbridge_reset(dev);
	dmbridge_free(dev);
}

static const struct {
	const char *name;
	size_t offset;
} counters[] = {
#define COUNTER(what) { #what, offsetof(struct dmbridge_stats, what) }
	COUNTER(commands), COUNTER(events), COUNTER(signals), COUNTER(mapped_writes),
	COUNTER(mapped_bytes), COUNTER(moves), COUNTER(moved_bytes), COUNTER(rings),
	COUNTER(suppressed), COUNTER(polled), COUNTER(attached),
#undef COUNTER
};

static ssize_t stats_show(struct device *device, struct device_attribute *attr, char *out)
{
	struct dmbridge *dev = dev_to_virtio(device)->priv;
	ssize_t len = 0;
	unsigned int i;
	int cpu;

	for (i = 0; i < ARRAY_SIZE(counters); i++) {
		u64 sum = 0;

		for_each_possible_cpu(cpu)
			sum += *(u64 *)((void *)per_cpu_ptr(dev->stats, cpu) + counters[i].offset);
		len += sysfs_emit_at(out, len, "%s %llu\n", counters[i].name, sum);
	}
	return len;
}
static DEVICE_ATTR_RO(stats);

static ssize_t gid_show(struct device *device, struct device_attribute *attr, char *out)
{
	struct dmbridge *dev = dev_to_virtio(device)->priv;

	return sysfs_emit(out, "%016llx\n", dev->limits.gid);
}
static DEVICE_ATTR_RO(gid);

static ssize_t mode_show(struct device *device, struct device_attribute *attr, char *out)
{
	struct dmbridge *dev = dev_to_virtio(device)->priv;

	return sysfs_emit(out, "%s\n", dmbridge_is_broken(dev) ? "broken" : dev->can_map ? "map" : "move");
}
static DEVICE_ATTR_RO(mode);

/* The EID that all guests of a host have in common, for SMC. */
static ssize_t eid_show(struct device *device, struct device_attribute *attr, char *out)
{
	struct dmbridge *dev = dev_to_virtio(device)->priv;

	return sysfs_emit(out, "%.*s\n", (int)sizeof(dev->limits.system_eid), dev->limits.system_eid);
}
static DEVICE_ATTR_RO(eid);

static struct attribute *dmbridge_attrs[] = {
	&dev_attr_stats.attr,
	&dev_attr_gid.attr,
	&dev_attr_mode.attr,
	&dev_attr_eid.attr,
	NULL,
};
ATTRIBUTE_GROUPS(dmbridge);

static const struct virtio_device_id ids[] = {
	{ DMBRIDGE_ID_QEMU, VIRTIO_DEV_ANY_ID },
	{ DMBRIDGE_ID_ISM, VIRTIO_DEV_ANY_ID },
	{ 0 },
};
MODULE_DEVICE_TABLE(virtio, ids);

static unsigned int features[] = {
	DMBRIDGE_F_MAP, DMBRIDGE_F_RAM_DMB, DMBRIDGE_F_RENDEZVOUS, DMBRIDGE_F_PRIVATE_LINE,
};

static struct virtio_driver driver = {
	.driver = {
		.name = KBUILD_MODNAME,
		.owner = THIS_MODULE,
		.dev_groups = dmbridge_groups,
	},
	.id_table = ids,
	.feature_table = features,
	.feature_table_size = ARRAY_SIZE(features),
	.validate = dmbridge_validate,
	.probe = dmbridge_probe,
	.remove = dmbridge_remove,
};

static int __init dmbridge_init(void)
{
	dmbridge_copy_calibrate();
	return register_virtio_driver(&driver);
}
module_init(dmbridge_init);

static void __exit dmbridge_exit(void)
{
	unregister_virtio_driver(&driver);
	/* Memory of remotes may still wait for its grace period. */
	rcu_barrier();
}
module_exit(dmbridge_exit);

MODULE_DESCRIPTION("Direct memory buffers between the virtual machines of a host");
MODULE_AUTHOR("The dmbridge authors");
MODULE_LICENSE("GPL");
