// SPDX-License-Identifier: GPL-2.0
/*
 * DMBs that this device owns.
 *
 * A DMB lies in the pool, that is in the window, where the peer can map it; or in
 * this guest's RAM, where the device cannot map or has no room to.
 *
 * Its owner hears of signals as long as it is registered. The control line is
 * disarmed by each wake-up, and armed again only after the owner has had its
 * turn: what the peer signals meanwhile costs it no interrupt.
 */
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>
#include "dmbridge.h"

/* Turns of owners before others get the CPU. */
#define ATTEND_BUDGET	64

/* RAM of a DMB whose unregistering was not answered: the device may write to it. */
struct grave {
	struct list_head list;
	void *memory;
	size_t size;
	void *line;
};

static void arm(struct dmbridge_line *line)
{
	WRITE_ONCE(line->armed, DMBRIDGE_ARMED_SIGNAL);
	/* Pairs with the sender's: it sees the wish, or we see its bits (9). */
	smp_mb();
}

/* Takes what is signalled and tells the owner; whether there was something. */
static bool take(struct dmbridge_dmb *dmb)
{
	u64 mask;

	if (!atomic64_read(&dmb->line->pending))
		return false;
	mask = atomic64_xchg(&dmb->line->pending, 0);
	if (!mask)
		return false;
	dmb->signal(dmb, mask);
	return true;
}

/*
 * The turn of those who were signalled. As it runs in the same soft interrupt,
 * and after the tasklets that the owners have scheduled, they have had theirs.
 */
static void attend(struct tasklet_struct *tasklet)
{
	struct dmbridge *dev = from_tasklet(dev, tasklet, attend);
	unsigned int budget = ATTEND_BUDGET;
	struct dmbridge_dmb *dmb;
	unsigned long flags;

	while (budget--) {
		spin_lock_irqsave(&dev->dmbs_lock, flags);
		dmb = list_first_entry_or_null(&dev->attend_list, struct dmbridge_dmb, attending);
		if (dmb) {
			list_del_init(&dmb->attending);
			if (take(dmb)) {
				list_add_tail(&dmb->attending, &dev->attend_list);
				dmbridge_count(dev, polled, 1);
				/* Its owner first. */
				budget = 0;
			} else {
				arm(dmb->line);
				if (take(dmb))
					list_add_tail(&dmb->attending, &dev->attend_list);
			}
		}
		spin_unlock_irqrestore(&dev->dmbs_lock, flags);
		if (!dmb)
			return;
	}
	tasklet_schedule(&dev->attend);
}

/* An event says that the peer has signalled. In the interrupt. */
void dmbridge_signalled(struct dmbridge *dev, u32 index, u64 token)
{
	struct dmbridge_dmb *dmb;
	unsigned long flags;

	if (index >= dev->limits.max_dmbs)
		return;
	spin_lock_irqsave(&dev->dmbs_lock, flags);
	dmb = dev->dmbs[index];
	if (dmb && dmb->token == token && dmb->is_programs) {
		dmbridge_count(dev, signals, 1);
		dmb->signal(dmb, 0);
	} else if (dmb && dmb->token == token) {
		dmbridge_count(dev, signals, 1);
		dmb->signal(dmb, atomic64_xchg(&dmb->line->pending, 0));
		if (list_empty(&dmb->attending))
			list_add_tail(&dmb->attending, &dev->attend_list);
		tasklet_schedule(&dev->attend);
	}
	spin_unlock_irqrestore(&dev->dmbs_lock, flags);
}

/* Whether a DMB and its control line lie in the window. */
bool dmbridge_in_window(struct dmbridge *dev, u64 offset, u64 size, u64 line_offset)
{
	u64 window = dev->limits.window_size;

	return dev->window && IS_ALIGNED(offset, SZ_4K) && IS_ALIGNED(size, SZ_4K) && size &&
	       offset < window && size <= window - offset &&
	       IS_ALIGNED(line_offset, DMBRIDGE_LINE_SIZE) && line_offset < window &&
	       (line_offset + DMBRIDGE_LINE_SIZE <= offset || line_offset >= offset + size);
}

static int register_with(struct dmbridge *dev, struct dmbridge_dmb *dmb)
{
	u8 body[sizeof(struct dmbridge_register) + sizeof(struct dmbridge_segment)] = {};
	struct dmbridge_register *request = (void *)body;
	struct dmbridge_register_reply reply;
	size_t len = sizeof(*request);
	bool taken;
	int rc;

	request->rgid = dmbridge_gid(dmb->peer);
	request->size = cpu_to_le64(dmb->size);
	if (dmb->is_programs && !dmb->ram)
		request->flags = cpu_to_le32(DMBRIDGE_REGISTER_PRIVATE_LINE);
	if (dmb->ram) {
		request->flags = cpu_to_le32(DMBRIDGE_REGISTER_RAM);
		request->num_segments = cpu_to_le32(1);
		request->line_addr = cpu_to_le64(virt_to_phys(dmb->line));
		request->segments[0].addr = cpu_to_le64(virt_to_phys(dmb->memory));
		request->segments[0].len = cpu_to_le64(dmb->size);
		len += sizeof(request->segments[0]);
	}
	rc = dmbridge_command(dev, DMBRIDGE_REGISTER, body, len, &reply, sizeof(reply));
	if (rc)
		return rc;
	dmb->token = le64_to_cpu(reply.token);
	dmb->index = le32_to_cpu(reply.index);
	dmb->offset = le64_to_cpu(reply.offset);
	dmb->line_offset = le64_to_cpu(reply.line_offset);
	dmb->flags = le32_to_cpu(reply.flags);
	if (!dmb->token || dmb->index >= dev->limits.max_dmbs ||
	    le64_to_cpu(reply.size) != dmb->size ||
	    (!dmb->ram && !dmbridge_in_window(dev, dmb->offset, dmb->size, dmb->line_offset)) ||
	    (!dmb->ram && dmb->is_programs && !(dmb->flags & DMBRIDGE_PAIR_PRIVATE_LINE))) {
		dmbridge_break(dev, "it registered a DMB where none can be");
		return -EIO;
	}
	if (!dmb->ram) {
		dmb->memory = dev->window + dmb->offset;
		dmb->line = dev->window + dmb->line_offset;
	}
	if (!dmb->is_programs)
		arm(dmb->line);
	spin_lock_irq(&dev->dmbs_lock);
	taken = dev->dmbs[dmb->index];
	if (!taken)
		dev->dmbs[dmb->index] = dmb;
	spin_unlock_irq(&dev->dmbs_lock);
	if (taken) {
		dmbridge_break(dev, "it gave two DMBs one number");
		return -EIO;
	}
	atomic_inc(&dev->live);
	dmbridge_watch(dev);
	return 0;
}

static void free_ram(struct dmbridge *dev, struct dmbridge_dmb *dmb, bool safe)
{
	struct grave *grave;

	if (!dmb->ram)
		return;
	if (safe) {
		if (dmb->memory)
			free_pages_exact(dmb->memory, dmb->size);
		free_page((unsigned long)dmb->line);
		return;
	}
	/* Without memory for a grave it is leaked, which is safe as well. */
	grave = kmalloc(sizeof(*grave), GFP_KERNEL);
	if (!grave)
		return;
	*grave = (struct grave){ .memory = dmb->memory, .size = dmb->size, .line = dmb->line };
	spin_lock_irq(&dev->dmbs_lock);
	list_add(&grave->list, &dev->graves);
	spin_unlock_irq(&dev->dmbs_lock);
}

static struct dmbridge_dmb *make(struct dmbridge *dev, u64 peer, size_t size,
				 void (*signal)(struct dmbridge_dmb *, u64), void *owner,
				 bool is_programs)
{
	/* What a program has counts for it. */
	gfp_t gfp = is_programs ? GFP_KERNEL_ACCOUNT : GFP_KERNEL;
	struct dmbridge_dmb *dmb;
	int rc = -EOPNOTSUPP;

	size = ALIGN(size, SZ_4K);
	if (!size || size > dev->limits.max_dmb_size)
		return ERR_PTR(-E2BIG);
	dmb = kzalloc(sizeof(*dmb), gfp);
	if (!dmb)
		return ERR_PTR(-ENOMEM);
	dmb->dev = dev;
	dmb->peer = peer;
	dmb->size = size;
	dmb->signal = signal;
	dmb->owner = owner;
	dmb->is_programs = is_programs;
	INIT_LIST_HEAD(&dmb->attending);
	if (dev->can_map && (dev->can_private_line || !is_programs))
		rc = register_with(dev, dmb);
	/* No room for another mapping, or none at all: in RAM, then. */
	if ((rc == -ENOSPC || rc == -EOPNOTSUPP) && dev->can_ram) {
		dmb->ram = true;
		/* A page, because a program may get it. */
		dmb->line = (void *)get_zeroed_page(gfp);
		dmb->memory = alloc_pages_exact(size, gfp | __GFP_ZERO | __GFP_NOWARN |
						      __GFP_NORETRY);
		rc = -ENOMEM;
		if (dmb->line && dmb->memory)
			rc = register_with(dev, dmb);
		if (rc)
			free_ram(dev, dmb, !dmbridge_is_broken(dev));
	}
	if (rc) {
		kfree(dmb);
		return ERR_PTR(rc);
	}
	return dmb;
}

/**
 * dmbridge_register() - make a DMB
 * @dev: the device
 * @peer: GID of the device that may write
 * @size: in bytes; made a multiple of 4096
 * @signal: see struct dmbridge_dmb
 * @owner: anything
 *
 * Context: may sleep.
 * Return: the DMB, whose memory is zero, or an error pointer.
 */
struct dmbridge_dmb *dmbridge_register(struct dmbridge *dev, u64 peer, size_t size,
				       void (*signal)(struct dmbridge_dmb *, u64), void *owner)
{
	return make(dev, peer, size, signal, owner, false);
}

/* The same for a program, which gets the control line as well. */
struct dmbridge_dmb *dmbridge_register_for(struct dmbridge *dev, u64 peer, size_t size,
					   void (*signal)(struct dmbridge_dmb *, u64), void *owner)
{
	return make(dev, peer, size, signal, owner, true);
}

/**
 * dmbridge_unregister() - let go of a DMB
 * @dmb: is freed; nothing is signalled any more when this returns
 *
 * Context: may sleep.
 */
void dmbridge_unregister(struct dmbridge_dmb *dmb)
{
	struct dmbridge *dev = dmb->dev;
	__le64 token = cpu_to_le64(dmb->token);
	int rc;

	spin_lock_irq(&dev->dmbs_lock);
	dev->dmbs[dmb->index] = NULL;
	list_del_init(&dmb->attending);
	spin_unlock_irq(&dev->dmbs_lock);
	atomic_dec(&dev->live);
	rc = dmbridge_command(dev, DMBRIDGE_UNREGISTER, &token, sizeof(token), NULL, 0);
	free_ram(dev, dmb, !rc);
	kfree(dmb);
}

void dmbridge_dmbs_init(struct dmbridge *dev)
{
	INIT_LIST_HEAD(&dev->attend_list);
	INIT_LIST_HEAD(&dev->graves);
	tasklet_setup(&dev->attend, attend);
}

/* After the device was reset. */
void dmbridge_dmbs_free(struct dmbridge *dev)
{
	struct grave *grave, *next;

	tasklet_kill(&dev->attend);
	list_for_each_entry_safe(grave, next, &dev->graves, list) {
		if (grave->memory)
			free_pages_exact(grave->memory, grave->size);
		free_page((unsigned long)grave->line);
		kfree(grave);
	}
	kvfree(dev->dmbs);
}
