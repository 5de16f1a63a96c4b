// SPDX-License-Identifier: GPL-2.0
/*
 * The move queues, usable in atomic context: whoever has to wait spins.
 *
 * Little data (a cursor) is taken along and not waited for. Much data is moved
 * from where it lies, and has been moved when dmbridge_move() returns, because
 * its owner will use the memory again. Moves of one token go by one queue, so
 * they are done in order.
 */
#include <linux/hash.h>
#include <linux/mm.h>
#include <linux/scatterlist.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include "dmbridge.h"

/* Who spins until a move is done. */
struct dmbridge_wait {
	bool done;
	int status;
};

static struct dmbridge_moves *queue_of(struct dmbridge *dev, u64 token)
{
	return &dev->moves[hash_64(token, 16) % dev->move_queues];
}

static int status_of(const struct dmbridge_slot *slot, unsigned int len)
{
	if (len != sizeof(slot->status))
		return -EPROTO;
	switch (slot->status[0]) {
	case 0:
		return 0;
	case ENOENT:
	case E2BIG:
	case EFAULT:
	case EINVAL:
		return -(int)slot->status[0];
	case 104:
		return -ECONNRESET;
	default:
		return -EPROTO;
	}
}

/* Takes back what the device has done. Under the lock. */
static void reap(struct dmbridge_moves *moves)
{
	struct dmbridge_slot *slot;
	unsigned int len;
	int status;

	while ((slot = virtqueue_get_buf(moves->vq, &len))) {
		status = status_of(slot, len);
		if (status == -EPROTO)
			dmbridge_break(moves->dev, "its answer to a move is none");
		if (slot->wait) {
			slot->wait->status = status;
			smp_store_release(&slot->wait->done, true);
		}
		if (slot->remote) {
			if (status)
				WRITE_ONCE(slot->remote->error, status);
			atomic_dec_return_release(&slot->remote->inflight);
			dmbridge_remote_put(slot->remote);
		}
		if (unlikely(slot->bounce))
			free_pages_exact(slot->bounce, DMBRIDGE_BOUNCE);
		slot->wait = NULL;
		slot->remote = NULL;
		slot->bounce = NULL;
		moves->busy--;
		list_add(&slot->free, &moves->free);
	}
	if (unlikely(virtqueue_is_broken(moves->vq)))
		dmbridge_break(moves->dev, "its move queue breaks its contract");
}

/*
 * The device owes something for too long. While another device is paused, moves to
 * it wait, and those behind them: then only who waits gives up.
 */
static int late(struct dmbridge *dev)
{
	if (atomic_read(&dev->num_paused))
		return -ETIMEDOUT;
	dmbridge_break(dev, "it does not do its moves");
	return -EIO;
}

/*
 * Spins until *done, or, without it, until something may have changed. A program leaves
 * the CPU to others, and gives up when it is killed.
 */
static int spin(struct dmbridge_moves *moves, const bool *done, ktime_t end, bool is_program)
{
	do {
		if (dmbridge_is_broken(moves->dev))
			return -EIO;
		if (is_program && fatal_signal_pending(current))
			return -EINTR;
		if (is_program)
			cond_resched();
		else
			cpu_relax();
		spin_lock_bh(&moves->lock);
		reap(moves);
		spin_unlock_bh(&moves->lock);
		if (!done || smp_load_acquire(done))
			return 0;
	} while (ktime_before(ktime_get(), end));
	return late(moves->dev);
}

static ktime_t patience(void)
{
	return ktime_add_ms(ktime_get(), DMBRIDGE_PATIENCE_MS);
}

/* The pieces of physical memory in which data lies; how much of it fits. */
static size_t pieces(struct scatterlist *sg, unsigned int *count, const u8 *data, size_t size)
{
	size_t done = 0, len;

	*count = 0;
	if (virt_addr_valid(data) && !is_vmalloc_addr(data)) {
		sg_set_buf(&sg[(*count)++], data, size);
		return size;
	}
	while (done < size && *count < DMBRIDGE_MOVE_PIECES) {
		len = min_t(size_t, size - done, PAGE_SIZE - offset_in_page(data + done));
		sg_set_page(&sg[(*count)++], vmalloc_to_page(data + done), len,
			    offset_in_page(data + done));
		done += len;
	}
	return done;
}

/*
 * Posts one move. Up to DMBRIDGE_MOVE_INLINE bytes are copied and nobody waits;
 * more are waited for, and with a program's @bounce, where the data lies, all. If the
 * wait is given up, *@bounce is the move's, and NULL here. Returns how many bytes were taken.
 */
static ssize_t post(struct dmbridge_moves *moves, struct dmbridge_move_header *header,
		    const void *data, size_t size, struct dmbridge_remote *remote,
		    void **bounce)
{
	struct scatterlist head, tail, sg[DMBRIDGE_MOVE_PIECES], *sgs[3];
	struct dmbridge_wait wait = { .done = false };
	ktime_t end = patience();
	struct dmbridge_slot *slot;
	unsigned int count, out;
	bool kick, inlined = size <= DMBRIDGE_MOVE_INLINE, waits = !inlined || bounce;
	int rc;

again:
	if (dmbridge_is_broken(moves->dev))
		return -EIO;
	spin_lock_bh(&moves->lock);
	reap(moves);
	slot = list_first_entry_or_null(&moves->free, struct dmbridge_slot, free);
	if (!slot) {
		spin_unlock_bh(&moves->lock);
		goto full;
	}
	slot->header = *header;
	sg_init_one(&head, &slot->header, sizeof(slot->header));
	sg_init_one(&tail, slot->status, sizeof(slot->status));
	memset(slot->status, 0xff, sizeof(slot->status));
	sgs[0] = &head;
	out = 1;
	if (size) {
		sg_init_table(sg, DMBRIDGE_MOVE_PIECES);
		if (inlined) {
			memcpy(slot->data, data, size);
			sg_set_buf(sg, slot->data, size);
			count = 1;
		} else {
			size = pieces(sg, &count, data, size);
		}
		sg_mark_end(&sg[count - 1]);
		sgs[out++] = sg;
	}
	sgs[out] = &tail;
	rc = virtqueue_add_sgs(moves->vq, sgs, out, 1, slot, GFP_ATOMIC);
	if (rc) {
		spin_unlock_bh(&moves->lock);
		if (rc == -EIO)
			return rc;
		goto full;
	}
	list_del_init(&slot->free);
	moves->busy++;
	slot->posted = jiffies;
	slot->wait = waits ? &wait : NULL;
	slot->remote = NULL;
	/* It may just have been forgotten: then nobody asks for its errors any more. */
	if (!waits && remote && kref_get_unless_zero(&remote->kref)) {
		atomic_inc(&remote->inflight);
		slot->remote = remote;
	}
	kick = virtqueue_kick_prepare(moves->vq);
	spin_unlock_bh(&moves->lock);
	if (kick)
		virtqueue_notify(moves->vq);
	dmbridge_count(moves->dev, moves, 1);
	dmbridge_count(moves->dev, moved_bytes, size);
	if (!waits)
		return size;
	rc = spin(moves, &wait.done, end, bounce);
	if (rc) {
		/* The device will not write to this stack. */
		spin_lock_bh(&moves->lock);
		if (slot->wait == &wait) {
			slot->wait = NULL;
			if (bounce && !inlined) {
				/* But it may yet read from there. */
				slot->bounce = *bounce;
				*bounce = NULL;
			}
		}
		spin_unlock_bh(&moves->lock);
		return wait.done && !wait.status ? size : rc;
	}
	return wait.status ? wait.status : size;
full:
	rc = spin(moves, NULL, end, bounce);
	if (!rc && ktime_after(ktime_get(), end))
		rc = late(moves->dev);
	if (rc)
		return rc;
	goto again;
}

/**
 * dmbridge_move() - have the device copy into a DMB of another one
 * @dev: the device
 * @token: the DMB
 * @offset: in it
 * @data: anything in the kernel's memory, the stack included
 * @size: of it
 * @mask: the owner's bits to set afterwards, or 0
 * @remote: is told if something fails that is not waited for; may be NULL
 *
 * Context: any but interrupts. Spins.
 * Return: 0, or what is wrong.
 */
int dmbridge_move(struct dmbridge *dev, u64 token, u64 offset, const void *data, size_t size,
		  u64 mask, struct dmbridge_remote *remote)
{
	struct dmbridge_moves *moves = queue_of(dev, token);
	struct dmbridge_move_header header = { .token = cpu_to_le64(token) };
	size_t most = min_t(u64, dev->limits.max_move_size, SZ_1G), part;
	ssize_t done;

	do {
		part = min(size, most);
		header.offset = cpu_to_le64(offset);
		/* The last piece of a piecewise copy has the signal. */
		if (part == size && mask && (part <= DMBRIDGE_MOVE_INLINE || virt_addr_valid(data))) {
			header.mask = cpu_to_le64(mask);
			header.flags = cpu_to_le32(DMBRIDGE_MOVE_SIGNAL);
			mask = 0;
		}
		done = post(moves, &header, data, part, remote, NULL);
		if (done < 0)
			return done;
		data += done;
		offset += done;
		size -= done;
	} while (size);
	if (mask) {
		header.mask = cpu_to_le64(mask);
		header.flags = cpu_to_le32(DMBRIDGE_MOVE_SIGNAL);
		done = post(moves, &header, NULL, 0, remote, NULL);
	}
	return done < 0 ? done : 0;
}

/**
 * dmbridge_move_and_wait() - have the device copy for a program
 * @dev: the device
 * @token: the DMB
 * @offset: in it
 * @bounce: DMBRIDGE_BOUNCE bytes of alloc_pages_exact(), with the data; NULL afterwards
 *	    if the device may still read there, and then freed when it does not
 * @size: of the data
 * @flags: as the program gave them
 * @mask: the same
 *
 * Context: a program's. Sleeps, and spins; ends when the program is killed.
 * Return: 0 when it is done, or what is wrong.
 */
int dmbridge_move_and_wait(struct dmbridge *dev, u64 token, u64 offset, void **bounce,
			   size_t size, u32 flags, u64 mask)
{
	struct dmbridge_move_header header = {
		.token = cpu_to_le64(token),
		.offset = cpu_to_le64(offset),
		.mask = cpu_to_le64(mask),
		.flags = cpu_to_le32(flags),
	};
	ssize_t rc = post(queue_of(dev, token), &header, *bounce, size, NULL, bounce);

	return rc < 0 ? rc : 0;
}

/* Wakes the owner of a DMB, whose wish to be woken was taken. */
int dmbridge_ring(struct dmbridge *dev, u64 token)
{
	struct dmbridge_move_header header = {
		.token = cpu_to_le64(token),
		.flags = cpu_to_le32(DMBRIDGE_MOVE_RING),
	};
	ssize_t rc = post(queue_of(dev, token), &header, NULL, 0, NULL, NULL);

	return rc < 0 ? rc : 0;
}

/* Waits until no move of a DMB is under way. */
int dmbridge_moves_drain(struct dmbridge_remote *remote)
{
	struct dmbridge_moves *moves = queue_of(remote->dev, remote->token);
	ktime_t end = patience();
	int rc;

	while (atomic_read_acquire(&remote->inflight)) {
		rc = spin(moves, NULL, end, false);
		if (rc)
			return rc;
		if (ktime_after(ktime_get(), end))
			return late(moves->dev);
	}
	return 0;
}

/*
 * Nobody waits for rings, and who waits for a peer's signal waits without asking:
 * a device that has died would not be noticed by anybody. So, as long as there is
 * a DMB, it is asked now and then for a move of nothing to nowhere.
 */
static void watch(struct work_struct *work)
{
	struct dmbridge *dev = container_of(to_delayed_work(work), struct dmbridge, watchdog);
	unsigned long limit = msecs_to_jiffies(DMBRIDGE_PATIENCE_MS);
	struct dmbridge_move_header nothing = {};
	bool busy = false, too_late = false;
	unsigned int i, j;

	for (i = 0; i < dev->move_queues; i++) {
		struct dmbridge_moves *moves = &dev->moves[i];

		spin_lock_bh(&moves->lock);
		reap(moves);
		busy |= moves->busy != 0;
		for (j = 0; moves->busy && j < DMBRIDGE_MOVE_SLOTS; j++)
			if (list_empty(&moves->slots[j].free) &&
			    time_after(jiffies, moves->slots[j].posted + limit))
				too_late = true;
		spin_unlock_bh(&moves->lock);
	}
	if (too_late)
		late(dev);
	else if (!busy && atomic_read(&dev->live))
		post(&dev->moves[0], &nothing, NULL, 0, NULL, NULL);
	dmbridge_watch(dev);
}

/* Looks after the device as long as there is something to lose. */
void dmbridge_watch(struct dmbridge *dev)
{
	unsigned int i;
	bool busy = atomic_read(&dev->live);

	for (i = 0; i < dev->move_queues; i++)
		busy |= READ_ONCE(dev->moves[i].busy) != 0;
	if (busy && !dmbridge_is_broken(dev) && !delayed_work_pending(&dev->watchdog))
		queue_delayed_work(system_wq, &dev->watchdog,
				   msecs_to_jiffies(DMBRIDGE_PATIENCE_MS / 4));
}

int dmbridge_moves_init(struct dmbridge *dev, struct virtqueue **vqs)
{
	unsigned int i, j;

	INIT_DELAYED_WORK(&dev->watchdog, watch);
	dev->moves = kcalloc(dev->move_queues, sizeof(*dev->moves), GFP_KERNEL);
	if (!dev->moves)
		return -ENOMEM;
	for (i = 0; i < dev->move_queues; i++) {
		struct dmbridge_moves *moves = &dev->moves[i];

		moves->dev = dev;
		moves->vq = vqs[i];
		spin_lock_init(&moves->lock);
		INIT_LIST_HEAD(&moves->free);
		moves->slots = kcalloc(DMBRIDGE_MOVE_SLOTS, sizeof(*moves->slots), GFP_KERNEL);
		if (!moves->slots)
			return -ENOMEM;
		for (j = 0; j < DMBRIDGE_MOVE_SLOTS; j++)
			list_add_tail(&moves->slots[j].free, &moves->free);
	}
	return 0;
}

void dmbridge_moves_free(struct dmbridge *dev)
{
	unsigned int i, j;

	if (!dev->moves)
		return;
	for (i = 0; i < dev->move_queues; i++) {
		for (j = 0; dev->moves[i].slots && j < DMBRIDGE_MOVE_SLOTS; j++) {
			struct dmbridge_slot *slot = &dev->moves[i].slots[j];

			if (slot->remote)
				dmbridge_remote_put(slot->remote);
			if (slot->bounce)
				free_pages_exact(slot->bounce, DMBRIDGE_BOUNCE);
		}
		kfree(dev->moves[i].slots);
	}
	kfree(dev->moves);
}
