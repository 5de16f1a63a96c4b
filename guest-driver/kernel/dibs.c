// SPDX-License-Identifier: GPL-2.0
/*
 * The device as a dibs device of Linux from 6.18 on. SMC is a client of dibs, so
 * AF_SMC sockets use it.
 *
 * SMC can write into the peer's DMB itself, without a copy in a buffer of its own.
 * But it decides so for a device, not for a peer, and a connection to one whose
 * DMB cannot be attached then breaks: if it is the first between the two, the end
 * that gives up has the other end's reset before that falls back to TCP. So it is
 * for hosts where all guests map each other, and has to be asked for.
 */
#include "dmbridge.h"

#ifdef DMBRIDGE_DIBS
#include <linux/dibs.h>
#include <linux/dma-mapping.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <net/smc.h>

static bool nocopy;
module_param(nocopy, bool, 0444);
MODULE_PARM_DESC(nocopy, "SMC writes into DMBs itself; only where all guests map each other");

/* SMC asks for it all the time, and relies on the answer being the same. */
static bool is_nocopy(const struct dmbridge *dev)
{
	return dev->can_map && nocopy;
}

static struct dmbridge *of(struct dibs_dev *dibs)
{
	return dibs->drv_priv;
}

/* Both are 16 bytes in the same order. */
static u64 gid_of(const uuid_t *uuid)
{
	return dmbridge_gid_id((const struct dmbridge_gid *)uuid->b);
}

static uuid_t uuid_of(u64 id)
{
	struct dmbridge_gid gid = dmbridge_gid(id);
	uuid_t uuid;

	BUILD_BUG_ON(sizeof(gid) != sizeof(uuid));
	memcpy(&uuid, &gid, sizeof(uuid));
	return uuid;
}

static u16 get_fabric_id(struct dibs_dev *dibs)
{
	return of(dibs)->limits.fabric_id;
}

static int query_remote_gid(struct dibs_dev *dibs, const uuid_t *rgid, u32 vid_valid, u32 vid)
{
	struct dmbridge_query_reply reply;
	int rc;

	/* Tenants are kept apart by the device's groups, not by VLANs. */
	if (vid_valid && vid != ISM_RESERVED_VLANID)
		return -EOPNOTSUPP;
	rc = dmbridge_command(of(dibs), DMBRIDGE_QUERY_GID, rgid->b, sizeof(rgid->b), &reply,
			      sizeof(reply));
	/* A server asks for its client. Later it would be too late for TCP. */
	if (!rc && is_nocopy(of(dibs)) && !(reply.flags & cpu_to_le32(DMBRIDGE_PAIR_MAP)))
		return -EOPNOTSUPP;
	return rc;
}

/* Of any device, and always. */
static int max_dmbs(void)
{
	return DMBRIDGE_SMC_DMBS;
}

/* The peer has written. With interrupts off. */
static void signalled(struct dmbridge_dmb *dmb, u64 mask)
{
	struct dibs_dev *dibs = dmb->dev->dibs;
	unsigned long flags;
	u8 id;

	if (dmb->index >= DMBRIDGE_SMC_DMBS)
		return;
	spin_lock_irqsave(&dibs->lock, flags);
	id = dibs->dmb_clientid_arr[dmb->index];
	if (id < MAX_DIBS_CLIENTS && dibs->subs[id])
		dibs->subs[id]->ops->handle_irq(dibs, dmb->index, mask);
	spin_unlock_irqrestore(&dibs->lock, flags);
}

static void set_client(struct dibs_dev *dibs, u32 index, u8 id)
{
	unsigned long flags;

	spin_lock_irqsave(&dibs->lock, flags);
	dibs->dmb_clientid_arr[index] = id;
	spin_unlock_irqrestore(&dibs->lock, flags);
}

static int register_dmb(struct dibs_dev *dibs, struct dibs_dmb *dibs_dmb,
			struct dibs_client *client)
{
	u64 peer = gid_of(&dibs_dmb->rgid);
	struct dmbridge_dmb *dmb;

	if (!peer)
		return -ENOENT;
	dmb = dmbridge_register(of(dibs), peer, dibs_dmb->dmb_len, signalled, NULL);
	if (IS_ERR(dmb))
		return PTR_ERR(dmb);
	/* The peer's SMC could not attach it. This one can still take TCP. */
	if (dmb->index >= DMBRIDGE_SMC_DMBS ||
	    (is_nocopy(of(dibs)) && (dmb->ram || !(dmb->flags & DMBRIDGE_PAIR_MAP)))) {
		dmbridge_unregister(dmb);
		return -ENOSPC;
	}
	set_client(dibs, dmb->index, client->id);
	dibs_dmb->dmb_tok = dmb->token;
	dibs_dmb->idx = dmb->index;
	dibs_dmb->cpu_addr = dmb->memory;
	/* SMC never unregisters a DMB whose address is 0. */
	dibs_dmb->dma_addr = DMA_MAPPING_ERROR;
	return 0;
}

static int unregister_dmb(struct dibs_dev *dibs, struct dibs_dmb *dibs_dmb)
{
	struct dmbridge *dev = of(dibs);
	struct dmbridge_dmb *dmb;

	if (dibs_dmb->idx >= dev->limits.max_dmbs)
		return -EINVAL;
	spin_lock_irq(&dev->dmbs_lock);
	dmb = dev->dmbs[dibs_dmb->idx];
	if (dmb && (dmb->token != dibs_dmb->dmb_tok || dmb->signal != signalled))
		dmb = NULL;
	spin_unlock_irq(&dev->dmbs_lock);
	if (!dmb)
		return -ENOENT;
	set_client(dibs, dmb->index, NO_DIBS_CLIENT);
	dmbridge_unregister(dmb);
	return 0;
}

/* In atomic context, with data that may lie on the stack. */
static int move_data(struct dibs_dev *dibs, u64 dmb_tok, unsigned int idx, bool sf,
		     unsigned int offset, void *data, unsigned int size)
{
	return dmbridge_write(of(dibs), dmb_tok, offset, data, size, sf);
}

static int signal_event(struct dibs_dev *dibs, const uuid_t *rgid, u32 trigger_irq, u32 event_code,
			u64 info)
{
	struct dmbridge_signal_event event = {
		.rgid = dmbridge_gid(gid_of(rgid)),
		.code = cpu_to_le32(event_code),
		.info = cpu_to_le64(info),
	};

	return dmbridge_command(of(dibs), DMBRIDGE_SIGNAL_EVENT, &event, sizeof(event), NULL, 0);
}

/* A device that lets in SMC's number for "none" is one for SMC-Dv2. */
static int no_vlan(struct dibs_dev *dibs, u64 vlan_id)
{
	return vlan_id == ISM_RESERVED_VLANID ? 0 : -EOPNOTSUPP;
}

static int support_mmapped_rdmb(struct dibs_dev *dibs)
{
	return is_nocopy(of(dibs));
}

static int attach_dmb(struct dibs_dev *dibs, struct dibs_dmb *dibs_dmb)
{
	u64 size;

	dibs_dmb->cpu_addr = dmbridge_remote_hold(of(dibs), dibs_dmb->dmb_tok, &size);
	if (!dibs_dmb->cpu_addr)
		return -EOPNOTSUPP;
	dibs_dmb->dma_addr = DMA_MAPPING_ERROR;
	dibs_dmb->dmb_len = min_t(u64, size, U32_MAX);
	return 0;
}

static int detach_dmb(struct dibs_dev *dibs, u64 token)
{
	dmbridge_remote_let_go(of(dibs), token);
	return 0;
}

static const struct dibs_dev_ops ops = {
	.get_fabric_id = get_fabric_id,
	.query_remote_gid = query_remote_gid,
	.max_dmbs = max_dmbs,
	.register_dmb = register_dmb,
	.unregister_dmb = unregister_dmb,
	.move_data = move_data,
	.add_vlan_id = no_vlan,
	.del_vlan_id = no_vlan,
	.signal_event = signal_event,
	.support_mmapped_rdmb = support_mmapped_rdmb,
	.attach_dmb = attach_dmb,
	.detach_dmb = detach_dmb,
};

int dmbridge_smc_add(struct dmbridge *dev)
{
	struct device *parent = dev->vdev->dev.parent;
	struct dibs_dev *dibs;
	int rc;

	/* SMC takes the parent for a PCI device when it lists its devices. */
	if (!dev_is_pci(parent)) {
		dev_info(&dev->vdev->dev, "not on a PCI bus, so not a dibs device\n");
		return 0;
	}
	dibs = dibs_dev_alloc();
	if (!dibs)
		return -ENOMEM;
	dibs->drv_priv = dev;
	dibs->ops = &ops;
	dibs->gid = uuid_of(dev->limits.gid);
	dibs->dev.parent = parent;
	dev_set_name(&dibs->dev, "dibs-%s", dev_name(&dev->vdev->dev));
	dev->dibs = dibs;
	rc = dibs_dev_add(dibs);
	if (rc) {
		dev->dibs = NULL;
		dmbridge_flush(dev);
		put_device(&dibs->dev);
		return rc;
	}
	dev_info(&dev->vdev->dev, "dibs device %016llx, fabric %04x\n", dev->limits.gid,
		 dev->limits.fabric_id);
	return 0;
}

void dmbridge_smc_remove(struct dmbridge *dev)
{
	if (!dev->dibs)
		return;
	dibs_dev_del(dev->dibs);
	/* What saw that it is there. */
	dmbridge_flush(dev);
	put_device(&dev->dibs->dev);
	dev->dibs = NULL;
}

static void tell(struct dmbridge *dev, const struct dibs_event *event)
{
	struct dibs_dev *dibs = dev->dibs;
	unsigned long flags;
	unsigned int i;

	if (!dibs || test_bit(DMBRIDGE_GOING, &dev->state))
		return;
	spin_lock_irqsave(&dibs->lock, flags);
	for (i = 0; i < MAX_DIBS_CLIENTS; i++)
		if (dibs->subs[i])
			dibs->subs[i]->ops->handle_event(dibs, event);
	spin_unlock_irqrestore(&dibs->lock, flags);
}

void dmbridge_smc_gone(struct dmbridge *dev, u64 gid)
{
	struct dibs_event event = {
		.type = DIBS_DEV_EVENT, .subtype = DIBS_DEV_DISABLED, .gid = uuid_of(gid),
	};

	tell(dev, &event);
}

void dmbridge_smc_unregistered(struct dmbridge *dev, u64 gid, u64 token)
{
	struct dibs_event event = {
		.type = DIBS_BUF_EVENT, .subtype = DIBS_BUF_UNREGISTERED, .gid = uuid_of(gid),
		.buffer_tok = token,
	};

	tell(dev, &event);
}

void dmbridge_smc_software(struct dmbridge *dev, u64 gid, u32 code, u64 info)
{
	struct dibs_event event = {
		.type = DIBS_SW_EVENT, .subtype = code, .gid = uuid_of(gid), .data = info,
	};

	tell(dev, &event);
}

#endif
