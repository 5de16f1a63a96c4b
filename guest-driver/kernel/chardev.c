// SPDX-License-Identifier: GPL-2.0
/*
 * The character device: DMBs for programs (uapi.h is the contract).
 *
 * A slot is a DMB that a file owns or has attached, and its place in the files'
 * address range: a page for the control line, then the DMB. No two files share a
 * slot, and places of different slots never overlap, whoever's they are.
 *
 * A meeting is what a file waits for with a key (RENDEZVOUS). The device knows it by
 * its number here, so that each file's tags are its own.
 *
 * A will is a move that is made when its file is closed. It is no more than the file
 * could have made before, and the last thing that it does.
 *
 * Nothing of a program's memory is touched while the device is held (enter()): who
 * takes the device away would wait for the program.
 */
#include <linux/idr.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/poll.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/uio.h>
#include <linux/version.h>
#include <linux/virtio_config.h>
#include "dmbridge.h"
#include "uapi.h"

#define VERSION		1
/* The files' address range, and the most slots in it. */
#define RANGE		(1ULL << 43)
#define MAX_SLOTS	8192
/*
 * Events of a file that wait to be read, but for signals, of which each DMB has one. What
 * programs tell each other leaves room for what the device tells.
 */
#define MAX_TOLD	1024
#define MAX_EVENTS	(16 * MAX_TOLD)
/* Tokens that are moved to and not attached, of a file: the oldest is forgotten. */
#define MAX_CLAIMS	8192
#define MAX_PIECES	1024

/*
 * What a program does in a DMB that is over is not to come back to it from another place:
 * what it reads is one page, the control line where it says that it sleeps another, and
 * what it writes for others a third.
 */
enum { NOTHING_OWNED, NOTHING_OWNED_LINE, NOTHING_ATTACHED, NUM_NOTHING };

struct slot {
	struct dmbridge_file *file;
	struct list_head list;
	/* By its token, as soon as it has one. */
	struct hlist_node node;
	int id;
	u64 token;
	u64 peer;
	u64 size;
	/* Of the line in its page. */
	u32 line_at;
	/* Where the two are. */
	unsigned long line_pfn;
	unsigned long pfn;
	/* One that this file owns, else it is attached. */
	bool owned;
	struct dmbridge_dmb *dmb;
	u32 index;
	/* Mapping it is over. */
	bool ended;
	/* In the file's list of slots whose signal is to be read. */
	struct list_head signalled;
};

/* Who moves to a token. */
struct claim {
	struct hlist_node node;
	/* The one that was used last is the last. */
	struct list_head list;
	struct dmbridge_file *file;
	u64 token;
};

struct waiting_event {
	struct list_head list;
	struct dmbridge_event event;
};

/* Until its event comes, or the file takes it back. */
struct meeting {
	struct dmbridge_file *file;
	struct list_head list;
	int id;
	u32 tag;
	u8 key[32];
	/* Room for its event, which so cannot be lost. */
	struct waiting_event *event;
};

struct dmbridge_file {
	struct dmbridge_chardev *chardev;
	struct list_head list;
	struct address_space *mapping;
	struct list_head slots;
	struct list_head claims;
	unsigned int num_claims;
	struct list_head meetings;
	unsigned int num_meetings;
	/* By number. */
	struct idr wills;
	unsigned int num_wills;
	/* Events: taken with interrupts off. */
	spinlock_t lock;
	struct list_head signalled;
	struct list_head events;
	unsigned int num_events;
	wait_queue_head_t wait;
	struct mutex bounce_mutex;
	void *bounce;
	/* What is seen in mappings that are over. */
	struct page *nothing[NUM_NOTHING];
};

struct dmbridge_chardev {
	struct kref kref;
	struct miscdevice misc;
	char name[16];
	int number;
	/* Read by who uses the device; written by who takes it away. */
	struct rw_semaphore alive;
	struct dmbridge *dev;
	/* There is nothing to wait for any more. */
	bool dead;
	/* Slots, meetings, claims, wills, files and what hangs on them. */
	struct mutex mutex;
	struct idr slots;
	DECLARE_HASHTABLE(tokens, 8);
	struct idr meetings;
	struct list_head files;
	DECLARE_HASHTABLE(claims, 8);
	u64 stride;
	u32 max_slots;
	/* A move's data at a time. */
	size_t most_moved;
};

static DEFINE_IDA(numbers);

static void release_chardev(struct kref *kref)
{
	struct dmbridge_chardev *chardev = container_of(kref, struct dmbridge_chardev, kref);

	idr_destroy(&chardev->slots);
	idr_destroy(&chardev->meetings);
	kfree(chardev);
}

/* The device, which stays until leave(); or NULL. */
static struct dmbridge *enter(struct dmbridge_chardev *chardev)
{
	down_read(&chardev->alive);
	if (chardev->dev && !dmbridge_is_broken(chardev->dev))
		return chardev->dev;
	up_read(&chardev->alive);
	return NULL;
}

static void leave(struct dmbridge_chardev *chardev)
{
	up_read(&chardev->alive);
}

/* --- events ----------------------------------------------------------------- */

static void tell(struct dmbridge_file *file, const struct dmbridge_event *event)
{
	bool is_told = event->type == cpu_to_le16(DMBRIDGE_EVENT_SOFTWARE);
	struct waiting_event *waiting = kmalloc(sizeof(*waiting), GFP_KERNEL);

	if (!waiting)
		return;
	waiting->event = *event;
	spin_lock_irq(&file->lock);
	if (file->num_events < (is_told ? MAX_TOLD : MAX_EVENTS)) {
		file->num_events++;
		list_add_tail(&waiting->list, &file->events);
		waiting = NULL;
	}
	spin_unlock_irq(&file->lock);
	kfree(waiting);
	wake_up_interruptible(&file->wait);
}

/* The peer has signalled a DMB of a file. In the interrupt. */
static void signalled(struct dmbridge_dmb *dmb, u64 mask)
{
	struct slot *slot = dmb->owner;
	struct dmbridge_file *file = slot->file;

	spin_lock(&file->lock);
	/* It may come before the registration's answer was looked at. */
	slot->token = dmb->token;
	slot->index = dmb->index;
	slot->peer = dmb->peer;
	if (list_empty(&slot->signalled))
		list_add_tail(&slot->signalled, &file->signalled);
	spin_unlock(&file->lock);
	wake_up_interruptible(&file->wait);
}

static struct slot *find_slot(struct dmbridge_chardev *chardev, u64 token, bool owned)
{
	struct slot *slot;

	hash_for_each_possible(chardev->tokens, slot, node, token)
		if (slot->token == token && slot->owned == owned)
			return slot;
	return NULL;
}

/* Takes a meeting out of the books; its event stays. Under the mutex. */
static struct waiting_event *take_meeting(struct meeting *meeting)
{
	struct waiting_event *event = meeting->event;

	idr_remove(&meeting->file->chardev->meetings, meeting->id);
	list_del(&meeting->list);
	meeting->file->num_meetings--;
	kfree(meeting);
	return event;
}

/* Somebody came with a key of a file. Under the mutex. */
static void met(struct dmbridge_chardev *chardev, const struct dmbridge_event *event)
{
	struct meeting *meeting = idr_find(&chardev->meetings, le32_to_cpu(event->index));
	struct dmbridge_file *file;
	struct waiting_event *waiting;
	u32 tag;

	if (!meeting)
		return;
	file = meeting->file;
	tag = meeting->tag;
	waiting = take_meeting(meeting);
	waiting->event = *event;
	waiting->event.index = cpu_to_le32(tag);
	spin_lock_irq(&file->lock);
	file->num_events++;
	list_add_tail(&waiting->list, &file->events);
	spin_unlock_irq(&file->lock);
	wake_up_interruptible(&file->wait);
}

/* An event of the device that is not SMC's alone. By the device's work. */
void dmbridge_chardev_event(struct dmbridge *dev, const struct dmbridge_event *event)
{
	struct dmbridge_chardev *chardev = READ_ONCE(dev->chardev);
	u64 token = le64_to_cpu(event->token);
	struct dmbridge_file *file;
	struct slot *slot;

	if (!chardev)
		return;
	mutex_lock(&chardev->mutex);
	switch (le16_to_cpu(event->type)) {
	case DMBRIDGE_EVENT_UNREGISTERED:
	case DMBRIDGE_EVENT_DETACHED:
		slot = find_slot(chardev, token,
				 event->type == cpu_to_le16(DMBRIDGE_EVENT_DETACHED));
		if (slot)
			tell(slot->file, event);
		break;
	case DMBRIDGE_EVENT_RENDEZVOUS:
		met(chardev, event);
		break;
	case DMBRIDGE_EVENT_SOFTWARE:
		if (le32_to_cpu(event->index) < DMBRIDGE_FIRST_CODE)
			break;
		fallthrough;
	case DMBRIDGE_EVENT_GONE:
	case DMBRIDGE_EVENT_PAUSED:
	case DMBRIDGE_EVENT_RESUMED:
		list_for_each_entry(file, &chardev->files, list)
			tell(file, event);
		break;
	}
	mutex_unlock(&chardev->mutex);
}

static ssize_t dmbridge_read(struct file *filp, char __user *to, size_t len, loff_t *pos)
{
	struct dmbridge_file *file = filp->private_data;
	struct waiting_event *waiting;
	struct dmbridge_event event;
	struct slot *slot;
	ssize_t done = 0;
	int rc;

	if (len < sizeof(event))
		return -EINVAL;
	while (len - done >= sizeof(event)) {
		waiting = NULL;
		spin_lock_irq(&file->lock);
		slot = list_first_entry_or_null(&file->signalled, struct slot, signalled);
		if (slot) {
			list_del_init(&slot->signalled);
			event = (struct dmbridge_event){
				.type = cpu_to_le16(DMBRIDGE_EVENT_SIGNAL),
				.index = cpu_to_le32(slot->index),
				.gid = dmbridge_gid(slot->peer),
				.token = cpu_to_le64(slot->token),
			};
		} else {
			waiting = list_first_entry_or_null(&file->events, struct waiting_event, list);
			if (waiting) {
				list_del(&waiting->list);
				file->num_events--;
				event = waiting->event;
			}
		}
		spin_unlock_irq(&file->lock);
		kfree(waiting);
		if (!slot && !waiting) {
			if (done)
				break;
			if (READ_ONCE(file->chardev->dead))
				return -ENODEV;
			if (filp->f_flags & O_NONBLOCK)
				return -EAGAIN;
			rc = wait_event_interruptible(file->wait,
						      !list_empty_careful(&file->signalled) ||
						      !list_empty_careful(&file->events) ||
						      READ_ONCE(file->chardev->dead));
			if (rc)
				return rc;
			continue;
		}
		if (copy_to_user(to + done, &event, sizeof(event)))
			return done ?: -EFAULT;
		done += sizeof(event);
	}
	return done;
}

static __poll_t dmbridge_poll(struct file *filp, struct poll_table_struct *table)
{
	struct dmbridge_file *file = filp->private_data;
	__poll_t mask = 0;

	poll_wait(filp, &file->wait, table);
	if (!list_empty_careful(&file->signalled) || !list_empty_careful(&file->events))
		mask |= EPOLLIN | EPOLLRDNORM;
	if (READ_ONCE(file->chardev->dead))
		mask |= EPOLLHUP | EPOLLERR;
	return mask;
}

/* --- slots ------------------------------------------------------------------ */

static u64 place_of(const struct slot *slot)
{
	return slot->id * slot->file->chardev->stride;
}

/* A slot that cannot be mapped until it is filled. Under the mutex. */
static int add_slot(struct dmbridge_file *file, struct slot *slot)
{
	struct dmbridge_chardev *chardev = file->chardev;
	int id = idr_alloc_cyclic(&chardev->slots, slot, 0, chardev->max_slots, GFP_KERNEL);

	if (id < 0)
		return -ENOSPC;
	slot->id = id;
	slot->file = file;
	slot->ended = true;
	list_add_tail(&slot->list, &file->slots);
	return 0;
}

/* Under the mutex. */
static void name_slot(struct slot *slot, u64 token)
{
	slot->token = token;
	hash_add(slot->file->chardev->tokens, &slot->node, token);
}

/* Under the mutex. */
static void remove_slot(struct slot *slot)
{
	list_del(&slot->list);
	hash_del(&slot->node);
	idr_remove(&slot->file->chardev->slots, slot->id);
}

/* Nobody can reach it any more by a mapping. Under the mutex. */
static void end_mapping(struct slot *slot)
{
	slot->ended = true;
	unmap_mapping_range(slot->file->mapping, place_of(slot), slot->size + PAGE_SIZE, 1);
}

/*
 * Has the device end what was removed, and frees it. Without the mutex, for which page
 * faults wait, because a command may take long.
 */
static void end_slot(struct dmbridge *dev, struct slot *slot)
{
	struct dmbridge_file *file = slot->file;
	__le64 token = cpu_to_le64(slot->token);

	if (slot->owned)
		dmbridge_unregister(slot->dmb);
	else
		dmbridge_command(dev, DMBRIDGE_DETACH, &token, sizeof(token), NULL, 0);
	spin_lock_irq(&file->lock);
	list_del_init(&slot->signalled);
	spin_unlock_irq(&file->lock);
	kfree(slot);
}

static struct slot *new_slot(void)
{
	struct slot *slot = kzalloc(sizeof(*slot), GFP_KERNEL_ACCOUNT);

	if (slot) {
		INIT_LIST_HEAD(&slot->list);
		INIT_HLIST_NODE(&slot->node);
		INIT_LIST_HEAD(&slot->signalled);
	}
	return slot;
}

static vm_fault_t dmbridge_fault(struct vm_fault *vmf)
{
	struct dmbridge_file *file = vmf->vma->vm_file->private_data;
	struct dmbridge_chardev *chardev = file->chardev;
	unsigned long at = vmf->pgoff % (chardev->stride >> PAGE_SHIFT);
	vm_fault_t result = VM_FAULT_OOM;
	struct page **nothing;
	struct slot *slot;

	mutex_lock(&chardev->mutex);
	slot = idr_find(&chardev->slots, vmf->pgoff / (chardev->stride >> PAGE_SHIFT));
	if (slot && slot->file == file && !slot->ended && at <= slot->size >> PAGE_SHIFT) {
		result = vmf_insert_pfn(vmf->vma, vmf->address,
					at ? slot->pfn + at - 1 : slot->line_pfn);
	} else {
		/* A program is told of the end, but it may be in the middle of something. */
		if (!vmf->vma->vm_private_data)
			nothing = &file->nothing[NOTHING_ATTACHED];
		else
			nothing = &file->nothing[at ? NOTHING_OWNED : NOTHING_OWNED_LINE];
		if (!*nothing)
			*nothing = alloc_page(GFP_KERNEL_ACCOUNT | __GFP_ZERO);
		if (*nothing)
			result = vmf_insert_pfn(vmf->vma, vmf->address, page_to_pfn(*nothing));
	}
	mutex_unlock(&chardev->mutex);
	return result;
}

static const struct vm_operations_struct vm_ops = {
	.fault = dmbridge_fault,
};

static int dmbridge_mmap(struct file *filp, struct vm_area_struct *vma)
{
	struct dmbridge_file *file = filp->private_data;
	struct dmbridge_chardev *chardev = file->chardev;
	u64 stride = chardev->stride, start = (u64)vma->vm_pgoff << PAGE_SHIFT;
	u64 len = vma->vm_end - vma->vm_start;
	struct slot *slot;
	int rc = -EINVAL;

	if (!(vma->vm_flags & VM_SHARED) || (vma->vm_flags & VM_EXEC))
		return -EINVAL;
	mutex_lock(&chardev->mutex);
	slot = idr_find(&chardev->slots, start / stride);
	if (slot && slot->file == file && !slot->ended && start % stride == 0 &&
	    len <= slot->size + PAGE_SIZE) {
		/* The window is memory, and mapped write-back in the kernel too. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 3, 0)
		vm_flags_mod(vma, VM_PFNMAP | VM_DONTEXPAND | VM_DONTDUMP, VM_MAYEXEC);
#else
		vma->vm_flags |= VM_PFNMAP | VM_DONTEXPAND | VM_DONTDUMP;
		vma->vm_flags &= ~VM_MAYEXEC;
#endif
		vma->vm_ops = &vm_ops;
		/* Which of the two, also when the slot is no more. */
		vma->vm_private_data = slot->owned ? file : NULL;
		rc = 0;
	}
	mutex_unlock(&chardev->mutex);
	return rc;
}

/* --- commands --------------------------------------------------------------- */

static int do_register(struct dmbridge_file *file, struct dmbridge *dev,
		       const struct dmbridge_register *request,
		       struct dmbridge_register_reply *reply)
{
	u64 size = le64_to_cpu(request->size), peer = dmbridge_gid_id(&request->rgid);
	struct dmbridge_dmb *dmb;
	struct slot *slot;
	int rc;

	if ((le32_to_cpu(request->flags) & ~DMBRIDGE_REGISTER_PRIVATE_LINE) || !size ||
	    !IS_ALIGNED(size, SZ_4K) || request->num_segments || request->line_addr)
		return -EINVAL;
	if (size > dev->limits.max_dmb_size)
		return -E2BIG;
	slot = new_slot();
	if (!slot)
		return -ENOMEM;
	slot->owned = true;
	mutex_lock(&file->chardev->mutex);
	rc = add_slot(file, slot);
	mutex_unlock(&file->chardev->mutex);
	if (rc) {
		kfree(slot);
		return rc;
	}
	dmb = dmbridge_register_for(dev, peer, size, signalled, slot);
	mutex_lock(&file->chardev->mutex);
	if (IS_ERR(dmb)) {
		rc = PTR_ERR(dmb);
		remove_slot(slot);
		mutex_unlock(&file->chardev->mutex);
		kfree(slot);
		return rc;
	}
	slot->dmb = dmb;
	name_slot(slot, dmb->token);
	slot->peer = peer;
	slot->size = dmb->size;
	if (dmb->ram) {
		slot->pfn = virt_to_phys(dmb->memory) >> PAGE_SHIFT;
		slot->line_pfn = virt_to_phys(dmb->line) >> PAGE_SHIFT;
	} else {
		slot->pfn = (dev->window_phys + dmb->offset) >> PAGE_SHIFT;
		slot->line_pfn = (dev->window_phys + dmb->line_offset) >> PAGE_SHIFT;
		slot->line_at = offset_in_page(dmb->line_offset);
	}
	slot->ended = false;
	*reply = (struct dmbridge_register_reply){
		.token = cpu_to_le64(slot->token),
		.offset = cpu_to_le64(place_of(slot) + PAGE_SIZE),
		.line_offset = cpu_to_le64(place_of(slot) + slot->line_at),
		.size = cpu_to_le64(slot->size),
		.index = cpu_to_le32(dmb->index),
		.flags = cpu_to_le32(dmb->flags & ~DMBRIDGE_PAIR_FUTEX),
	};
	mutex_unlock(&file->chardev->mutex);
	return 0;
}

/* Who moves to a token; NULL: nobody, as far as is known. Under the mutex. */
static struct claim *find_claim(struct dmbridge_chardev *chardev, u64 token)
{
	struct claim *claim;

	hash_for_each_possible(chardev->claims, claim, node, token)
		if (claim->token == token)
			return claim;
	return NULL;
}

static int do_attach(struct dmbridge_file *file, struct dmbridge *dev, u64 token,
		     struct dmbridge_attach_reply *reply)
{
	struct dmbridge_chardev *chardev = file->chardev;
	__le64 le_token = cpu_to_le64(token);
	u64 offset, line_offset, size;
	struct claim *claim;
	struct slot *slot;
	int rc;

	if (dmbridge_remote_is_known(dev, token))
		return -EALREADY;
	slot = new_slot();
	if (!slot)
		return -ENOMEM;
	mutex_lock(&chardev->mutex);
	claim = find_claim(chardev, token);
	if (find_slot(chardev, token, false) || (claim && claim->file != file))
		rc = -EALREADY;
	else
		rc = add_slot(file, slot);
	/* Now, so that its end, which may come before the answer was looked at, is told. */
	if (!rc)
		name_slot(slot, token);
	mutex_unlock(&chardev->mutex);
	if (rc) {
		kfree(slot);
		return rc;
	}
	rc = dmbridge_command(dev, DMBRIDGE_ATTACH, &le_token, sizeof(le_token), reply, sizeof(*reply));
	if (rc)
		goto fail;
	offset = le64_to_cpu(reply->offset);
	line_offset = le64_to_cpu(reply->line_offset);
	size = le64_to_cpu(reply->size);
	if (!dmbridge_in_window(dev, offset, size, line_offset)) {
		dmbridge_break(dev, "it attached a DMB where none can be");
		rc = -EIO;
	} else if (!(le32_to_cpu(reply->flags) & DMBRIDGE_PAIR_PRIVATE_LINE) ||
		   size > chardev->stride - PAGE_SIZE) {
		rc = -EOPNOTSUPP;
	}
	if (rc) {
		dmbridge_command(dev, DMBRIDGE_DETACH, &le_token, sizeof(le_token), NULL, 0);
		goto fail;
	}
	mutex_lock(&chardev->mutex);
	slot->peer = dmbridge_gid_id(&reply->gid);
	slot->size = size;
	slot->pfn = (dev->window_phys + offset) >> PAGE_SHIFT;
	slot->line_pfn = (dev->window_phys + line_offset) >> PAGE_SHIFT;
	slot->line_at = offset_in_page(line_offset);
	slot->ended = false;
	reply->offset = cpu_to_le64(place_of(slot) + PAGE_SIZE);
	reply->line_offset = cpu_to_le64(place_of(slot) + slot->line_at);
	reply->flags &= ~cpu_to_le32(DMBRIDGE_PAIR_FUTEX);
	mutex_unlock(&chardev->mutex);
	return 0;
fail:
	mutex_lock(&chardev->mutex);
	remove_slot(slot);
	mutex_unlock(&chardev->mutex);
	kfree(slot);
	return rc;
}

static int do_end(struct dmbridge_file *file, struct dmbridge *dev, u64 token, bool owned)
{
	struct slot *slot;

	mutex_lock(&file->chardev->mutex);
	slot = find_slot(file->chardev, token, owned);
	if (!slot || slot->file != file || slot->ended) {
		mutex_unlock(&file->chardev->mutex);
		return -ENOENT;
	}
	end_mapping(slot);
	remove_slot(slot);
	mutex_unlock(&file->chardev->mutex);
	end_slot(dev, slot);
	return 0;
}

/* Under the mutex. */
static struct meeting *find_meeting(struct dmbridge_file *file, const u8 *name, u32 tag)
{
	struct meeting *meeting;

	list_for_each_entry(meeting, &file->meetings, list)
		if (meeting->tag == tag && !memcmp(meeting->key, name, sizeof(meeting->key)))
			return meeting;
	return NULL;
}

static int do_rendezvous(struct dmbridge_file *file, struct dmbridge *dev,
			 const struct dmbridge_rendezvous *request,
			 struct dmbridge_rendezvous_reply *reply)
{
	struct dmbridge_chardev *chardev = file->chardev;
	struct dmbridge_rendezvous ours = *request;
	u32 tag = le32_to_cpu(request->tag);
	struct meeting *meeting;
	int rc, id;

	meeting = kzalloc(sizeof(*meeting), GFP_KERNEL_ACCOUNT);
	if (!meeting)
		return -ENOMEM;
	meeting->event = kzalloc(sizeof(*meeting->event), GFP_KERNEL_ACCOUNT);
	if (!meeting->event) {
		kfree(meeting);
		return -ENOMEM;
	}
	meeting->file = file;
	meeting->tag = tag;
	memcpy(meeting->key, request->key, sizeof(meeting->key));
	mutex_lock(&chardev->mutex);
	if (find_meeting(file, request->key, tag))
		rc = -EALREADY;
	else if (file->num_meetings >= DMBRIDGE_MAX_KEYS)
		rc = -EDQUOT;
	else
		/* Cyclic: an event that is late finds nothing, and not another meeting. */
		rc = idr_alloc_cyclic(&chardev->meetings, meeting, 1, 0, GFP_KERNEL);
	if (rc > 0) {
		meeting->id = rc;
		list_add_tail(&meeting->list, &file->meetings);
		file->num_meetings++;
	}
	mutex_unlock(&chardev->mutex);
	if (rc < 0) {
		kfree(meeting->event);
		kfree(meeting);
		return rc;
	}
	id = rc;
	ours.tag = cpu_to_le32(id);
	ours.reserved = 0;
	rc = dmbridge_command(dev, DMBRIDGE_RENDEZVOUS, &ours, sizeof(ours), reply, sizeof(*reply));
	if (!rc && !dmbridge_gid_id(&reply->gid))
		return 0;
	/* Nobody will come for it. Whether it is still there is the device's word. */
	mutex_lock(&chardev->mutex);
	meeting = idr_find(&chardev->meetings, id);
	if (meeting)
		kfree(take_meeting(meeting));
	mutex_unlock(&chardev->mutex);
	return rc;
}

static int cancel(struct dmbridge *dev, const struct meeting *meeting)
{
	struct dmbridge_cancel_rendezvous request = { .tag = cpu_to_le32(meeting->id) };

	memcpy(request.key, meeting->key, sizeof(request.key));
	return dmbridge_command(dev, DMBRIDGE_CANCEL_RENDEZVOUS, &request, sizeof(request), NULL, 0);
}

static int do_cancel(struct dmbridge_file *file, struct dmbridge *dev,
		     const struct dmbridge_cancel_rendezvous *request)
{
	struct meeting *meeting;
	int rc = -ENOENT;

	mutex_lock(&file->chardev->mutex);
	meeting = find_meeting(file, request->key, le32_to_cpu(request->tag));
	if (meeting)
		rc = cancel(dev, meeting);
	/* Else its event is on its way, and is this file's. */
	if (!rc)
		kfree(take_meeting(meeting));
	mutex_unlock(&file->chardev->mutex);
	return rc;
}

static long ioctl_command(struct dmbridge_file *file, void __user *arg)
{
	union {
		struct dmbridge_command header;
		u8 bytes[sizeof(struct dmbridge_command) + sizeof(struct dmbridge_rendezvous)];
	} command = {};
	union {
		struct dmbridge_answer header;
		u8 bytes[sizeof(struct dmbridge_answer) + sizeof(struct dmbridge_attach_reply)];
	} answer = {};
	struct dmbridge_signal_event *event;
	struct dmbridge_request request;
	size_t needs, gives = 0;
	struct dmbridge *dev;
	void *body, *reply;
	bool broken;
	u64 token;
	u16 what;
	int rc;

	if (copy_from_user(&request, arg, sizeof(request)))
		return -EFAULT;
	if (request.command_len < sizeof(command.header) || request.answer_len < sizeof(answer.header))
		return -EINVAL;
	request.command_len = min_t(u32, request.command_len, sizeof(command.bytes));
	if (copy_from_user(command.bytes, u64_to_user_ptr(request.command), request.command_len))
		return -EFAULT;
	dev = enter(file->chardev);
	if (!dev)
		return -ENODEV;
	what = command.header.class << 8 | command.header.command;
	switch (what) {
	case DMBRIDGE_QUERY_GID:
		needs = sizeof(struct dmbridge_gid);
		gives = sizeof(struct dmbridge_query_reply);
		break;
	case DMBRIDGE_RENDEZVOUS:
		needs = sizeof(struct dmbridge_rendezvous);
		gives = sizeof(struct dmbridge_rendezvous_reply);
		break;
	case DMBRIDGE_CANCEL_RENDEZVOUS:
		needs = sizeof(struct dmbridge_cancel_rendezvous);
		break;
	case DMBRIDGE_REGISTER:
		needs = sizeof(struct dmbridge_register);
		gives = sizeof(struct dmbridge_register_reply);
		break;
	case DMBRIDGE_ATTACH:
		needs = sizeof(token);
		gives = sizeof(struct dmbridge_attach_reply);
		break;
	case DMBRIDGE_UNREGISTER:
	case DMBRIDGE_DETACH:
		needs = sizeof(token);
		break;
	case DMBRIDGE_SIGNAL_EVENT:
		needs = sizeof(*event);
		break;
	default:
		rc = -EOPNOTSUPP;
		goto out;
	}
	rc = -EINVAL;
	if (request.command_len < sizeof(command.header) + needs ||
	    request.answer_len < sizeof(answer.header) + gives)
		goto out;
	body = command.header.body;
	reply = answer.header.reply;
	token = le64_to_cpu(*(__le64 *)body);
	switch (what) {
	case DMBRIDGE_RENDEZVOUS:
		rc = do_rendezvous(file, dev, body, reply);
		break;
	case DMBRIDGE_CANCEL_RENDEZVOUS:
		rc = do_cancel(file, dev, body);
		break;
	case DMBRIDGE_REGISTER:
		rc = do_register(file, dev, body, reply);
		break;
	case DMBRIDGE_ATTACH:
		rc = do_attach(file, dev, token, reply);
		break;
	case DMBRIDGE_UNREGISTER:
	case DMBRIDGE_DETACH:
		rc = do_end(file, dev, token, what == DMBRIDGE_UNREGISTER);
		break;
	case DMBRIDGE_SIGNAL_EVENT:
		event = body;
		if (le32_to_cpu(event->code) < DMBRIDGE_FIRST_CODE)
			break;
		fallthrough;
	default:
		rc = dmbridge_command(dev, what, body, needs, reply, gives);
	}
out:
	broken = dmbridge_is_broken(dev);
	leave(file->chardev);
	if (broken)
		return -ENODEV;
	answer.header.status = -rc;
	gives = sizeof(answer.header) + (rc ? 0 : gives);
	if (rc)
		memset(answer.header.reply, 0, sizeof(answer.bytes) - sizeof(answer.header));
	if (copy_to_user(u64_to_user_ptr(request.answer), answer.bytes, gives))
		return -EFAULT;
	return gives;
}

/* --- moves ------------------------------------------------------------------ */

static void drop_claim(struct claim *claim)
{
	hash_del(&claim->node);
	list_del(&claim->list);
	claim->file->num_claims--;
	kfree(claim);
}

/* Makes the token this file's to move to, if it is nobody's. */
static int claim(struct dmbridge_file *file, struct dmbridge *dev, u64 token)
{
	struct dmbridge_chardev *chardev = file->chardev;
	struct claim *claim;
	struct slot *slot;
	int rc = 0;

	if (dmbridge_remote_is_known(dev, token))
		return -EBUSY;
	mutex_lock(&chardev->mutex);
	slot = find_slot(chardev, token, false);
	if (slot) {
		rc = slot->file == file ? 0 : -EBUSY;
		goto out;
	}
	claim = find_claim(chardev, token);
	if (claim) {
		if (claim->file == file)
			list_move_tail(&claim->list, &file->claims);
		else
			rc = -EBUSY;
		goto out;
	}
	claim = kmalloc(sizeof(*claim), GFP_KERNEL_ACCOUNT);
	if (!claim) {
		rc = -ENOMEM;
		goto out;
	}
	if (file->num_claims >= MAX_CLAIMS)
		drop_claim(list_first_entry(&file->claims, struct claim, list));
	claim->file = file;
	claim->token = token;
	hash_add(chardev->claims, &claim->node, token);
	list_add_tail(&claim->list, &file->claims);
	file->num_claims++;
out:
	mutex_unlock(&chardev->mutex);
	return rc;
}

/* Whether a move of this file to the token needs nobody's leave. Under the mutex. */
static bool is_ours(struct dmbridge_file *file, u64 token)
{
	struct slot *slot = find_slot(file->chardev, token, false);
	struct claim *claim = find_claim(file->chardev, token);

	return slot ? slot->file == file : claim && claim->file == file;
}

/* There is no such DMB any more. */
static void disclaim(struct dmbridge_file *file, u64 token)
{
	struct claim *claim;

	mutex_lock(&file->chardev->mutex);
	claim = find_claim(file->chardev, token);
	if (claim && claim->file == file)
		drop_claim(claim);
	mutex_unlock(&file->chardev->mutex);
}

static long ioctl_move(struct dmbridge_file *file, void __user *arg)
{
	struct dmbridge_chardev *chardev = file->chardev;
	struct iovec small[UIO_FASTIOV], *pieces = small;
	struct dmbridge_move_header *header;
	struct dmbridge_move move;
	struct iov_iter data;
	u64 token, offset, mask;
	struct dmbridge *dev;
	size_t left, part;
	bool is_ring;
	u32 flags;
	long rc;

	if (copy_from_user(&move, arg, sizeof(move)))
		return -EFAULT;
	header = (void *)move.header;
	token = le64_to_cpu(header->token);
	offset = le64_to_cpu(header->offset);
	mask = le64_to_cpu(header->mask);
	flags = le32_to_cpu(header->flags);
	if (flags & ~(DMBRIDGE_MOVE_SIGNAL | DMBRIDGE_MOVE_RING))
		return -EINVAL;
	if (move.num_pieces > MAX_PIECES)
		return -E2BIG;
	is_ring = flags == DMBRIDGE_MOVE_RING && !move.num_pieces;
	dev = enter(chardev);
	if (!dev)
		return -ENODEV;
	rc = claim(file, dev, token);
	if (!rc && is_ring)
		rc = dmbridge_ring(dev, token);
	leave(chardev);
	if (rc || is_ring)
		return rc;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 3, 0)
	rc = import_iovec(ITER_SOURCE, u64_to_user_ptr(move.pieces), move.num_pieces,
			  ARRAY_SIZE(small), &pieces, &data);
#else
	rc = import_iovec(WRITE, u64_to_user_ptr(move.pieces), move.num_pieces,
			  ARRAY_SIZE(small), &pieces, &data);
#endif
	if (rc < 0)
		return rc;
	left = rc;
	mutex_lock(&file->bounce_mutex);
	do {
		part = min(left, chardev->most_moved);
		rc = -ENOMEM;
		if (part && !file->bounce)
			file->bounce = alloc_pages_exact(DMBRIDGE_BOUNCE, GFP_KERNEL_ACCOUNT);
		if (part && !file->bounce)
			break;
		rc = -EFAULT;
		if (part && !copy_from_iter_full(file->bounce, part, &data))
			break;
		left -= part;
		rc = -ENODEV;
		dev = enter(chardev);
		if (!dev)
			break;
		rc = dmbridge_move_and_wait(dev, token, offset, &file->bounce, part,
					    left ? 0 : flags, left ? 0 : mask);
		leave(chardev);
		offset += part;
		cond_resched();
	} while (!rc && left);
	mutex_unlock(&file->bounce_mutex);
	kfree(pieces);
	if (rc == -ENOENT)
		disclaim(file, token);
	return rc;
}

/* --- wills ------------------------------------------------------------------ */

static long ioctl_leave_will(struct dmbridge_file *file, void __user *arg)
{
	struct dmbridge_chardev *chardev = file->chardev;
	struct dmbridge_will *will = memdup_user(arg, sizeof(*will));
	long rc;

	if (IS_ERR(will))
		return PTR_ERR(will);
	rc = -EINVAL;
	if (!will->len || will->len > sizeof(will->data) || !will->mask || will->reserved)
		goto out;
	rc = -ENODEV;
	if (!enter(chardev))
		goto out;
	mutex_lock(&chardev->mutex);
	if (!is_ours(file, will->token))
		rc = -ENOENT;
	else if (file->num_wills >= DMBRIDGE_MAX_WILLS)
		rc = -EDQUOT;
	else
		rc = idr_alloc(&file->wills, will, 1, 0, GFP_KERNEL_ACCOUNT);
	if (rc > 0) {
		file->num_wills++;
		will = NULL;
	}
	mutex_unlock(&chardev->mutex);
	leave(chardev);
out:
	kfree(will);
	return rc;
}

static long ioctl_withdraw_will(struct dmbridge_file *file, unsigned long number)
{
	struct dmbridge_will *will;

	mutex_lock(&file->chardev->mutex);
	will = idr_remove(&file->wills, number);
	if (will)
		file->num_wills--;
	mutex_unlock(&file->chardev->mutex);
	kfree(will);
	return will ? 0 : -ENOENT;
}

/* Nobody uses the file any more. */
static void carry_out_wills(struct dmbridge_file *file, struct dmbridge *dev)
{
	struct dmbridge_will *will;
	bool ours;
	int id;

	idr_for_each_entry(&file->wills, will, id) {
		mutex_lock(&file->chardev->mutex);
		ours = is_ours(file, will->token) && !dmbridge_remote_is_known(dev, will->token);
		mutex_unlock(&file->chardev->mutex);
		/* So little data is taken along. Where a queue stands still, it is not waited for twice. */
		if (ours && dmbridge_move(dev, will->token, will->offset, will->data, will->len,
					  will->mask, NULL) == -ETIMEDOUT)
			return;
		cond_resched();
	}
}

static void free_wills(struct dmbridge_file *file)
{
	struct dmbridge_will *will;
	int id;

	idr_for_each_entry(&file->wills, will, id)
		kfree(will);
	idr_destroy(&file->wills);
}

/* --- the file --------------------------------------------------------------- */

static long ioctl_info(struct dmbridge_file *file, void __user *arg)
{
	struct dmbridge_info info = {
		.version = VERSION,
		.max_slots = file->chardev->max_slots,
		.features = BIT_ULL(DMBRIDGE_F_MAP) | BIT_ULL(VIRTIO_F_VERSION_1),
	};
	struct dmbridge_config *config = (void *)info.config;
	struct dmbridge *dev = enter(file->chardev);

	BUILD_BUG_ON(sizeof(*config) > sizeof(info.config));
	if (!dev)
		return -ENODEV;
	if (virtio_has_feature(dev->vdev, DMBRIDGE_F_RENDEZVOUS))
		info.features |= BIT_ULL(DMBRIDGE_F_RENDEZVOUS);
	virtio_cread_bytes(dev->vdev, 0, config, sizeof(*config));
	config->window_size = cpu_to_le64(file->chardev->stride * file->chardev->max_slots);
	config->max_dmb_size = cpu_to_le64(dev->limits.max_dmb_size);
	leave(file->chardev);
	return copy_to_user(arg, &info, sizeof(info)) ? -EFAULT : 0;
}

static long dmbridge_ioctl(struct file *filp, unsigned int what, unsigned long arg)
{
	struct dmbridge_file *file = filp->private_data;

	switch (what) {
	case DMBRIDGE_INFO:
		return ioctl_info(file, (void __user *)arg);
	case DMBRIDGE_COMMAND:
		return ioctl_command(file, (void __user *)arg);
	case DMBRIDGE_MOVE:
		return ioctl_move(file, (void __user *)arg);
	case DMBRIDGE_LEAVE_WILL:
		return ioctl_leave_will(file, (void __user *)arg);
	case DMBRIDGE_WITHDRAW_WILL:
		return ioctl_withdraw_will(file, arg);
	default:
		return -ENOTTY;
	}
}

static int dmbridge_open(struct inode *inode, struct file *filp)
{
	struct dmbridge_chardev *chardev =
		container_of(filp->private_data, struct dmbridge_chardev, misc);
	struct dmbridge_file *file = kzalloc(sizeof(*file), GFP_KERNEL_ACCOUNT);

	if (!file)
		return -ENOMEM;
	file->chardev = chardev;
	file->mapping = filp->f_mapping;
	INIT_LIST_HEAD(&file->slots);
	INIT_LIST_HEAD(&file->claims);
	INIT_LIST_HEAD(&file->meetings);
	idr_init(&file->wills);
	INIT_LIST_HEAD(&file->signalled);
	INIT_LIST_HEAD(&file->events);
	spin_lock_init(&file->lock);
	mutex_init(&file->bounce_mutex);
	init_waitqueue_head(&file->wait);
	kref_get(&chardev->kref);
	mutex_lock(&chardev->mutex);
	list_add_tail(&file->list, &chardev->files);
	mutex_unlock(&chardev->mutex);
	filp->private_data = file;
	return nonseekable_open(inode, filp);
}

/* Ends all that a file has. */
static void end_file(struct dmbridge_file *file, struct dmbridge *dev)
{
	struct meeting *meeting, *next_meeting;
	struct claim *claim, *next_claim;
	struct slot *slot, *next_slot;
	LIST_HEAD(slots);

	mutex_lock(&file->chardev->mutex);
	list_for_each_entry_safe(meeting, next_meeting, &file->meetings, list) {
		cancel(dev, meeting);
		kfree(take_meeting(meeting));
	}
	list_for_each_entry_safe(slot, next_slot, &file->slots, list) {
		end_mapping(slot);
		remove_slot(slot);
		list_add_tail(&slot->list, &slots);
	}
	list_for_each_entry_safe(claim, next_claim, &file->claims, list)
		drop_claim(claim);
	mutex_unlock(&file->chardev->mutex);
	list_for_each_entry_safe(slot, next_slot, &slots, list)
		end_slot(dev, slot);
}

static int dmbridge_release(struct inode *inode, struct file *filp)
{
	struct dmbridge_file *file = filp->private_data;
	struct dmbridge_chardev *chardev = file->chardev;
	struct waiting_event *waiting, *next;
	unsigned int i;

	down_read(&chardev->alive);
	/* Without a device, all was ended when it went. */
	if (chardev->dev) {
		carry_out_wills(file, chardev->dev);
		end_file(file, chardev->dev);
	}
	mutex_lock(&chardev->mutex);
	list_del(&file->list);
	mutex_unlock(&chardev->mutex);
	up_read(&chardev->alive);
	list_for_each_entry_safe(waiting, next, &file->events, list)
		kfree(waiting);
	free_wills(file);
	if (file->bounce)
		free_pages_exact(file->bounce, DMBRIDGE_BOUNCE);
	for (i = 0; i < NUM_NOTHING; i++)
		if (file->nothing[i])
			__free_page(file->nothing[i]);
	kfree(file);
	kref_put(&chardev->kref, release_chardev);
	return 0;
}

static const struct file_operations fops = {
	.owner = THIS_MODULE,
	.open = dmbridge_open,
	.release = dmbridge_release,
	.read = dmbridge_read,
	.poll = dmbridge_poll,
	.mmap = dmbridge_mmap,
	.unlocked_ioctl = dmbridge_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};

int dmbridge_chardev_add(struct dmbridge *dev)
{
	struct dmbridge_chardev *chardev = kzalloc(sizeof(*chardev), GFP_KERNEL);
	int rc;

	if (!chardev)
		return -ENOMEM;
	kref_init(&chardev->kref);
	init_rwsem(&chardev->alive);
	mutex_init(&chardev->mutex);
	idr_init(&chardev->slots);
	hash_init(chardev->tokens);
	idr_init(&chardev->meetings);
	INIT_LIST_HEAD(&chardev->files);
	hash_init(chardev->claims);
	chardev->dev = dev;
	chardev->stride = roundup_pow_of_two(dev->limits.max_dmb_size + PAGE_SIZE);
	chardev->max_slots = min_t(u64, RANGE / chardev->stride, MAX_SLOTS);
	chardev->most_moved = min_t(u64, dev->limits.max_move_size, DMBRIDGE_BOUNCE);
	chardev->number = ida_alloc(&numbers, GFP_KERNEL);
	if (chardev->number < 0) {
		rc = chardev->number;
		goto fail;
	}
	snprintf(chardev->name, sizeof(chardev->name), "dmbridge%d", chardev->number);
	chardev->misc.minor = MISC_DYNAMIC_MINOR;
	chardev->misc.name = chardev->name;
	chardev->misc.fops = &fops;
	chardev->misc.parent = &dev->vdev->dev;
	chardev->misc.mode = 0600;
	dev->chardev = chardev;
	rc = misc_register(&chardev->misc);
	if (!rc)
		return 0;
	WRITE_ONCE(dev->chardev, NULL);
	dmbridge_flush(dev);
	ida_free(&numbers, chardev->number);
fail:
	kref_put(&chardev->kref, release_chardev);
	return rc;
}

void dmbridge_chardev_remove(struct dmbridge *dev)
{
	struct dmbridge_chardev *chardev = dev->chardev;
	struct dmbridge_file *file;

	if (!chardev)
		return;
	misc_deregister(&chardev->misc);
	down_write(&chardev->alive);
	list_for_each_entry(file, &chardev->files, list)
		end_file(file, dev);
	chardev->dev = NULL;
	WRITE_ONCE(chardev->dead, true);
	list_for_each_entry(file, &chardev->files, list)
		wake_up_interruptible(&file->wait);
	up_write(&chardev->alive);
	WRITE_ONCE(dev->chardev, NULL);
	/* Who saw it. */
	dmbridge_flush(dev);
	ida_free(&numbers, chardev->number);
	kref_put(&chardev->kref, release_chardev);
}

/* The device is not used any more. */
void dmbridge_chardev_broken(struct dmbridge *dev)
{
	struct dmbridge_chardev *chardev = READ_ONCE(dev->chardev);
	struct dmbridge_file *file;

	if (!chardev)
		return;
	WRITE_ONCE(chardev->dead, true);
	mutex_lock(&chardev->mutex);
	list_for_each_entry(file, &chardev->files, list)
		wake_up_interruptible(&file->wait);
	mutex_unlock(&chardev->mutex);
}
