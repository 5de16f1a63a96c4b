// SPDX-License-Identifier: GPL-2.0
/*
 * The device as an SMC-D device of Linux up to 6.2, so that AF_SMC sockets use it;
 * and what is said where there is no way.
 */
#include <linux/dma-mapping.h>
#include <linux/pci.h>
#include "dmbridge.h"

#ifdef DMBRIDGE_SMCD
#include <net/smc.h>

/* SMC asks for it without saying of which device: that of the first. */
static u8 system_eid[32];

static struct dmbridge *of(struct smcd_dev *smcd)
{
	return smcd->priv;
}

/*
 * Tenants are kept apart by the device's groups, not by VLANs. SMC-Dv2 does not
 * have them either, and says so by a number that is none.
 */
static bool is_no_vlan(u32 vid)
{
	return vid == ISM_RESERVED_VLANID;
}

static int query_remote_gid(struct smcd_dev *smcd, u64 rgid, u32 vid_valid, u32 vid)
{
	struct dmbridge_gid gid = dmbridge_gid(rgid);
	struct dmbridge_query_reply reply;

	if (vid_valid && !is_no_vlan(vid))
		return -EOPNOTSUPP;
	return dmbridge_command(of(smcd), DMBRIDGE_QUERY_GID, &gid, sizeof(gid), &reply,
				sizeof(reply));
}

/* The peer has written, so its connection has something to look at. */
static void signalled(struct dmbridge_dmb *dmb, u64 mask)
{
	if (dmb->index < DMBRIDGE_SMC_DMBS)
		smcd_handle_irq(dmb->dev->smcd, dmb->index, mask);
}

static int register_dmb(struct smcd_dev *smcd, struct smcd_dmb *smcd_dmb)
{
	struct dmbridge_dmb *dmb;

	if (smcd_dmb->vlan_valid && !is_no_vlan(smcd_dmb->vlan_id))
		return -EOPNOTSUPP;
	dmb = dmbridge_register(of(smcd), smcd_dmb->rgid, smcd_dmb->dmb_len, signalled, NULL);
	if (IS_ERR(dmb))
		return PTR_ERR(dmb);
	if (dmb->index >= DMBRIDGE_SMC_DMBS) {
		dmbridge_unregister(dmb);
		return -ENOSPC;
	}
	smcd_dmb->dmb_tok = dmb->token;
	smcd_dmb->sba_idx = dmb->index;
	smcd_dmb->cpu_addr = dmb->memory;
	/* SMC never unregisters a DMB whose address is 0. */
	smcd_dmb->dma_addr = DMA_MAPPING_ERROR;
	return 0;
}

static int unregister_dmb(struct smcd_dev *smcd, struct smcd_dmb *smcd_dmb)
{
	struct dmbridge *dev = of(smcd);
	struct dmbridge_dmb *dmb;

	if (smcd_dmb->sba_idx >= dev->limits.max_dmbs)
		return -EINVAL;
	spin_lock_irq(&dev->dmbs_lock);
	dmb = dev->dmbs[smcd_dmb->sba_idx];
	if (dmb && (dmb->token != smcd_dmb->dmb_tok || dmb->signal != signalled))
		dmb = NULL;
	spin_unlock_irq(&dev->dmbs_lock);
	if (!dmb)
		return -ENOENT;
	dmbridge_unregister(dmb);
	return 0;
}

static int no_vlan(struct smcd_dev *smcd, u64 vlan_id)
{
	return is_no_vlan(vlan_id) ? 0 : -EOPNOTSUPP;
}

static int no_vlan_required(struct smcd_dev *smcd)
{
	return -EOPNOTSUPP;
}

static int signal_event(struct smcd_dev *smcd, u64 rgid, u32 trigger_irq, u32 event_code, u64 info)
{
	struct dmbridge_signal_event event = {
		.rgid = dmbridge_gid(rgid),
		.code = cpu_to_le32(event_code),
		.info = cpu_to_le64(info),
	};

	return dmbridge_command(of(smcd), DMBRIDGE_SIGNAL_EVENT, &event, sizeof(event), NULL, 0);
}

/* In atomic context, with data that may lie on the stack. */
static int move_data(struct smcd_dev *smcd, u64 dmb_tok, unsigned int idx, bool sf,
		     unsigned int offset, void *data, unsigned int size)
{
	return dmbridge_write(of(smcd), dmb_tok, offset, data, size, sf);
}

static u8 *get_system_eid(void)
{
	return system_eid;
}

static u16 get_chid(struct smcd_dev *smcd)
{
	return of(smcd)->limits.fabric_id;
}

static const struct smcd_ops ops = {
	.query_remote_gid = query_remote_gid,
	.register_dmb = register_dmb,
	.unregister_dmb = unregister_dmb,
	.add_vlan_id = no_vlan,
	.del_vlan_id = no_vlan,
	.set_vlan_required = no_vlan_required,
	.reset_vlan_required = no_vlan_required,
	.signal_event = signal_event,
	.move_data = move_data,
	.get_system_eid = get_system_eid,
	.get_chid = get_chid,
};

int dmbridge_smc_add(struct dmbridge *dev)
{
	struct device *parent = dev->vdev->dev.parent;
	struct smcd_dev *smcd;
	char name[32];
	int rc;

	/* smc.ko takes the parent for a PCI device when it lists its devices. */
	if (!dev_is_pci(parent)) {
		dev_info(&dev->vdev->dev, "not on a PCI bus, so not an SMC-D device\n");
		return 0;
	}
	/* Beside the virtio device, so it needs a name of its own. */
	snprintf(name, sizeof(name), "smcd-%s", dev_name(&dev->vdev->dev));
	smcd = smcd_alloc_dev(parent, name, &ops, DMBRIDGE_SMC_DMBS);
	if (!smcd)
		return -ENOMEM;
	smcd->priv = dev;
	smcd->local_gid = dev->limits.gid;
	memcpy(system_eid, dev->limits.system_eid, sizeof(system_eid));
	dev->smcd = smcd;
	rc = smcd_register_dev(smcd);
	if (rc) {
		dev->smcd = NULL;
		dmbridge_flush(dev);
		smcd_free_dev(smcd);
		return rc;
	}
	dev_info(&dev->vdev->dev, "SMC-D device %016llx, CHID %04x\n", dev->limits.gid,
		 dev->limits.fabric_id);
	return 0;
}

/* Ends all connections over it. */
void dmbridge_smc_remove(struct dmbridge *dev)
{
	if (!dev->smcd)
		return;
	smcd_unregister_dev(dev->smcd);
	/* What saw that it is there. */
	dmbridge_flush(dev);
	smcd_free_dev(dev->smcd);
	dev->smcd = NULL;
}

void dmbridge_smc_gone(struct dmbridge *dev, u64 gid)
{
	struct smcd_event event = { .type = ISM_EVENT_GID, .tok = gid };

	if (dev->smcd && !test_bit(DMBRIDGE_GOING, &dev->state))
		smcd_handle_event(dev->smcd, &event);
}

void dmbridge_smc_software(struct dmbridge *dev, u64 gid, u32 code, u64 info)
{
	struct smcd_event event = { .type = ISM_EVENT_SWR, .code = code, .tok = gid, .info = info };

	if (dev->smcd && !test_bit(DMBRIDGE_GOING, &dev->state))
		smcd_handle_event(dev->smcd, &event);
}

/* SMC has not attached it. */
void dmbridge_smc_unregistered(struct dmbridge *dev, u64 gid, u64 token)
{
}

#elif !defined(DMBRIDGE_DIBS)

int dmbridge_smc_add(struct dmbridge *dev)
{
	dev_info(&dev->vdev->dev,
		 "not an SMC-D device: this kernel %s\n",
		 LINUX_VERSION_CODE >= KERNEL_VERSION(6, 18, 0) ? "is built without DIBS" :
		 IS_ENABLED(CONFIG_SMC) ? "lets in devices of s390 only (Linux 6.3 to 6.17)" :
					  "is built without SMC");
	return 0;
}

void dmbridge_smc_remove(struct dmbridge *dev)
{
}

void dmbridge_smc_gone(struct dmbridge *dev, u64 gid)
{
}

void dmbridge_smc_software(struct dmbridge *dev, u64 gid, u32 code, u64 info)
{
}

void dmbridge_smc_unregistered(struct dmbridge *dev, u64 gid, u64 token)
{
}

#endif
