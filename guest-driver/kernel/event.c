// SPDX-License-Identifier: GPL-2.0
/*
 * The event queue. Signals are handled in the interrupt; everything else keeps
 * its buffer until work has handled it, so that nothing is lost and a device
 * that floods waits for itself.
 */
#include <linux/scatterlist.h>
#include <linux/slab.h>
#include "dmbridge.h"

static int post(struct dmbridge_events *events, struct dmbridge_event_buffer *buffer)
{
	struct scatterlist sg;

	sg_init_one(&sg, &buffer->event, sizeof(buffer->event));
	return virtqueue_add_inbuf(events->vq, &sg, 1, buffer, GFP_ATOMIC);
}

/* Devices that are remembered as paused; one is enough to be patient. */
#define MAX_PAUSED	1024

/* A device that is paused. */
struct paused {
	struct list_head list;
	u64 gid;
};

static void set_paused(struct dmbridge *dev, u64 gid, bool is_paused)
{
	struct paused *paused;

	list_for_each_entry(paused, &dev->paused, list) {
		if (paused->gid != gid)
			continue;
		if (!is_paused) {
			list_del(&paused->list);
			kfree(paused);
			atomic_dec(&dev->num_paused);
		}
		return;
	}
	if (!is_paused || atomic_read(&dev->num_paused) >= MAX_PAUSED)
		return;
	paused = kmalloc(sizeof(*paused), GFP_KERNEL);
	if (paused) {
		paused->gid = gid;
		list_add(&paused->list, &dev->paused);
		atomic_inc(&dev->num_paused);
	}
}

static void handle(struct dmbridge *dev, const struct dmbridge_event *event)
{
	u64 gid = dmbridge_gid_id(&event->gid);
	u64 token = le64_to_cpu(event->token);

	dmbridge_chardev_event(dev, event);
	switch (le16_to_cpu(event->type)) {
	case DMBRIDGE_EVENT_UNREGISTERED:
		dmbridge_remote_ended(dev, token);
		dmbridge_smc_unregistered(dev, gid, token);
		break;
	case DMBRIDGE_EVENT_PAUSED:
		set_paused(dev, gid, true);
		break;
	case DMBRIDGE_EVENT_RESUMED:
		set_paused(dev, gid, false);
		break;
	case DMBRIDGE_EVENT_GONE:
		set_paused(dev, gid, false);
		dev_dbg(&dev->vdev->dev, "device %016llx is gone\n", gid);
		dmbridge_remotes_of_ended(dev, gid);
		dmbridge_smc_gone(dev, gid);
		break;
	case DMBRIDGE_EVENT_SOFTWARE:
		dmbridge_smc_software(dev, gid, le32_to_cpu(event->index), le64_to_cpu(event->info));
		break;
	/* What is mapped where is learned by attaching; nobody asks who detached. */
	default:
		break;
	}
}

static void work(struct work_struct *work)
{
	struct dmbridge *dev = container_of(work, struct dmbridge, events.work);
	struct dmbridge_events *events = &dev->events;
	struct dmbridge_event_buffer *buffer;
	struct dmbridge_event event;

	for (;;) {
		spin_lock_irq(&events->lock);
		buffer = list_first_entry_or_null(&events->waiting, struct dmbridge_event_buffer, list);
		if (buffer) {
			list_del(&buffer->list);
			event = buffer->event;
			if (!post(events, buffer))
				virtqueue_kick(events->vq);
		}
		spin_unlock_irq(&events->lock);
		if (!buffer)
			return;
		handle(dev, &event);
		cond_resched();
	}
}

void dmbridge_events_interrupt(struct virtqueue *vq)
{
	struct dmbridge *dev = vq->vdev->priv;
	struct dmbridge_events *events = &dev->events;
	struct dmbridge_event_buffer *buffer;
	bool later = false, failed = false;
	unsigned long flags;
	unsigned int len;

	spin_lock_irqsave(&events->lock, flags);
	do {
		virtqueue_disable_cb(vq);
		while ((buffer = virtqueue_get_buf(vq, &len))) {
			dmbridge_count(dev, events, 1);
			if (len != sizeof(buffer->event)) {
				failed = true;
				continue;
			}
			if (buffer->event.type != cpu_to_le16(DMBRIDGE_EVENT_SIGNAL)) {
				list_add_tail(&buffer->list, &events->waiting);
				later = true;
				continue;
			}
			dmbridge_signalled(dev, le32_to_cpu(buffer->event.index),
					   le64_to_cpu(buffer->event.token));
			failed |= post(events, buffer) != 0;
		}
	} while (!failed && !virtqueue_enable_cb(vq));
	failed |= virtqueue_is_broken(vq);
	virtqueue_kick(vq);
	spin_unlock_irqrestore(&events->lock, flags);
	if (failed)
		dmbridge_break(dev, "its event queue breaks its contract");
	if (later)
		queue_work(dev->wq, &events->work);
}

int dmbridge_events_init(struct dmbridge *dev, struct virtqueue *vq)
{
	struct dmbridge_events *events = &dev->events;

	events->vq = vq;
	INIT_WORK(&events->work, work);
	events->buffers = kcalloc(DMBRIDGE_EVENTS, sizeof(*events->buffers), GFP_KERNEL);
	return events->buffers ? 0 : -ENOMEM;
}

void dmbridge_events_start(struct dmbridge *dev)
{
	struct dmbridge_events *events = &dev->events;
	unsigned int i;

	spin_lock_irq(&events->lock);
	for (i = 0; i < DMBRIDGE_EVENTS; i++)
		if (post(events, &events->buffers[i]))
			break;
	virtqueue_kick(events->vq);
	spin_unlock_irq(&events->lock);
}

void dmbridge_events_free(struct dmbridge *dev)
{
	struct paused *paused, *next;

	list_for_each_entry_safe(paused, next, &dev->paused, list)
		kfree(paused);
	kfree(dev->events.buffers);
}
