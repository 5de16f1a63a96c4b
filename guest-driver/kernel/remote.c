// SPDX-License-Identifier: GPL-2.0
/*
 * Writing into DMBs of other devices, in atomic context and knowing no more than
 * a token.
 *
 * The first write to a token goes by a move, and has work attach the DMB. Once it
 * is attached, and no move is under way, writes are stores into the window. What
 * cannot be attached, because it lies in its owner's RAM or this device cannot
 * map, is moved for good. An attached DMB is let go when its owner has
 * unregistered it, or is gone.
 */
#include <linux/hash.h>
#include <linux/slab.h>
#include "dmbridge.h"

/*
 * DMBs that cannot be attached are known only so that nobody tries again. Nothing
 * says when they end, so the oldest are forgotten.
 */
#define MAX_UNMAPPABLE	1024

static void release(struct kref *kref)
{
	struct dmbridge_remote *remote = container_of(kref, struct dmbridge_remote, kref);

	kfree_rcu(remote, rcu);
}

void dmbridge_remote_put(struct dmbridge_remote *remote)
{
	kref_put(&remote->kref, release);
}

static struct dmbridge_remote *find(struct dmbridge *dev, u64 token)
{
	struct dmbridge_remote *remote;

	hash_for_each_possible_rcu(dev->remotes, remote, node, token)
		if (remote->token == token)
			return remote;
	return NULL;
}

/*
 * Takes it out of the table, which had a reference; whether that was to be done.
 * What is held stays, unless the device itself is gone.
 */
static bool forget(struct dmbridge_remote *remote, bool held_too)
{
	struct dmbridge *dev = remote->dev;
	bool was;

	spin_lock_bh(&dev->remotes_lock);
	was = !hlist_unhashed(&remote->node) && (held_too || !remote->held);
	if (was) {
		hlist_del_init_rcu(&remote->node);
		if (!list_empty(&remote->unmappable)) {
			list_del_init(&remote->unmappable);
			dev->num_unmappable--;
		}
	}
	spin_unlock_bh(&dev->remotes_lock);
	return was;
}

/* It is moved into for good. Under the lock. */
static void set_unmappable(struct dmbridge_remote *remote)
{
	struct dmbridge *dev = remote->dev;
	struct dmbridge_remote *oldest;

	WRITE_ONCE(remote->state, DMBRIDGE_REMOTE_MOVES);
	if (hlist_unhashed(&remote->node))
		return;
	list_add_tail(&remote->unmappable, &dev->unmappable);
	if (dev->num_unmappable < MAX_UNMAPPABLE) {
		dev->num_unmappable++;
		return;
	}
	/* Nobody holds it: there is no address to be had. */
	oldest = list_first_entry(&dev->unmappable, struct dmbridge_remote, unmappable);
	list_del_init(&oldest->unmappable);
	hlist_del_init_rcu(&oldest->node);
	dmbridge_remote_put(oldest);
}

static void attach(struct work_struct *work)
{
	struct dmbridge_remote *remote = container_of(work, struct dmbridge_remote, attach);
	struct dmbridge *dev = remote->dev;
	struct dmbridge_attach_reply reply;
	__le64 token = cpu_to_le64(remote->token);
	u64 offset, line_offset;
	int rc;

	rc = dmbridge_command(dev, DMBRIDGE_ATTACH, &token, sizeof(token), &reply, sizeof(reply));
	switch (rc) {
	case 0:
		offset = le64_to_cpu(reply.offset);
		line_offset = le64_to_cpu(reply.line_offset);
		remote->size = le64_to_cpu(reply.size);
		remote->owner = dmbridge_gid_id(&reply.gid);
		if (!dmbridge_in_window(dev, offset, remote->size, line_offset)) {
			dmbridge_break(dev, "it attached a DMB where none can be");
			break;
		}
		remote->memory = dev->window + offset;
		remote->line = dev->window + line_offset;
		/* All of the above is seen by who sees this. */
		smp_store_release(&remote->state, DMBRIDGE_REMOTE_MAPPED);
		break;
	case -ENOENT:
		/* Moves will be told the same. */
		if (forget(remote, true))
			dmbridge_remote_put(remote);
		break;
	default:
		spin_lock_bh(&dev->remotes_lock);
		set_unmappable(remote);
		spin_unlock_bh(&dev->remotes_lock);
	}
	dmbridge_remote_put(remote);
}

/* Under RCU. */
static struct dmbridge_remote *find_or_add(struct dmbridge *dev, u64 token)
{
	struct dmbridge_remote *remote, *other;

	remote = find(dev, token);
	if (remote)
		return remote;
	remote = kzalloc(sizeof(*remote), GFP_ATOMIC);
	if (!remote)
		return NULL;
	remote->dev = dev;
	remote->token = token;
	kref_init(&remote->kref);
	INIT_LIST_HEAD(&remote->unmappable);
	INIT_WORK(&remote->attach, attach);
	spin_lock_bh(&dev->remotes_lock);
	other = find(dev, token);
	if (!other) {
		hash_add_rcu(dev->remotes, &remote->node, token);
		if (!dev->can_map) {
			set_unmappable(remote);
		} else {
			kref_get(&remote->kref);
			queue_work(dev->wq, &remote->attach);
		}
	}
	spin_unlock_bh(&dev->remotes_lock);
	if (other) {
		kfree(remote);
		return other;
	}
	return remote;
}

/* Whether SMC writes to it. */
bool dmbridge_remote_is_known(struct dmbridge *dev, u64 token)
{
	bool known;

	rcu_read_lock();
	known = find(dev, token);
	rcu_read_unlock();
	return known;
}

static int ring(struct dmbridge_remote *remote)
{
	struct dmbridge_line *line = remote->line;

	/* The bits are seen after the data, and before the wish is looked at (9). */
	smp_mb__before_atomic();
	atomic64_or(1, &line->pending);
	smp_mb__after_atomic();
	if (!READ_ONCE(line->armed) || xchg(&line->armed, DMBRIDGE_ARMED_NO) != DMBRIDGE_ARMED_SIGNAL) {
		WRITE_ONCE(line->suppressed, READ_ONCE(line->suppressed) + 1);
		dmbridge_count(remote->dev, suppressed, 1);
		return 0;
	}
	WRITE_ONCE(line->rung, READ_ONCE(line->rung) + 1);
	dmbridge_count(remote->dev, rings, 1);
	return dmbridge_ring(remote->dev, remote->token);
}

static int store(struct dmbridge_remote *remote, u64 offset, const void *data, size_t size,
		 bool signal)
{
	int rc;

	if (offset > remote->size || size > remote->size - offset)
		return -EINVAL;
	/* Nothing that was moved before may come after this. */
	if (unlikely(atomic_read_acquire(&remote->inflight))) {
		rc = dmbridge_moves_drain(remote);
		if (rc)
			return rc;
	}
	dmbridge_copy(remote->dev, remote->memory + offset, data, size);
	dmbridge_count(remote->dev, mapped_writes, 1);
	dmbridge_count(remote->dev, mapped_bytes, size);
	return signal ? ring(remote) : 0;
}

/**
 * dmbridge_write() - write into a DMB of another device
 * @dev: the device
 * @token: the DMB
 * @offset: in it
 * @data: what is to be seen there; may be used again when this returns
 * @size: of it
 * @signal: tell the owner afterwards
 *
 * Aligned words of eight bytes are never torn, and what one CPU writes is seen in
 * order.
 *
 * Context: any but interrupts. Spins.
 * Return: 0, or what is wrong with this write or with one before.
 */
int dmbridge_write(struct dmbridge *dev, u64 token, u64 offset, const void *data, size_t size,
		   bool signal)
{
	struct dmbridge_remote *remote;
	int rc;

	if (dmbridge_is_broken(dev))
		return -EIO;
	rcu_read_lock();
	remote = find_or_add(dev, token);
	if (remote && smp_load_acquire(&remote->state) == DMBRIDGE_REMOTE_MAPPED)
		rc = store(remote, offset, data, size, signal);
	else
		rc = dmbridge_move(dev, token, offset, data, size, signal, remote);
	if (remote && !rc)
		rc = READ_ONCE(remote->error);
	rcu_read_unlock();
	return rc;
}

/* Lets go of some that are not in the table any more. */
static void let_go(struct dmbridge *dev, struct dmbridge_remote **ended, unsigned int count)
{
	__le64 token;
	unsigned int i;

	if (!count)
		return;
	/* Whoever stores into one of them has finished. */
	synchronize_rcu();
	for (i = 0; i < count; i++) {
		if (ended[i]->state == DMBRIDGE_REMOTE_MAPPED) {
			token = cpu_to_le64(ended[i]->token);
			dmbridge_command(dev, DMBRIDGE_DETACH, &token, sizeof(token), NULL, 0);
		}
		dmbridge_remote_put(ended[i]);
	}
}

/* The owner has unregistered it. By @dev's work, as attaching is. */
void dmbridge_remote_ended(struct dmbridge *dev, u64 token)
{
	struct dmbridge_remote *remote;

	rcu_read_lock();
	remote = find(dev, token);
	if (remote && !forget(remote, false))
		remote = NULL;
	rcu_read_unlock();
	if (remote)
		let_go(dev, &remote, 1);
}

/**
 * dmbridge_remote_hold() - attach a DMB and have its address
 * @dev: the device
 * @token: the DMB
 * @size: of it
 *
 * Context: may sleep.
 * Return: the address, which is good until dmbridge_remote_let_go() was called as
 *	   often as this; or NULL.
 */
void *dmbridge_remote_hold(struct dmbridge *dev, u64 token, u64 *size)
{
	struct dmbridge_remote *remote;
	void *memory = NULL;

	rcu_read_lock();
	remote = find_or_add(dev, token);
	if (remote && !kref_get_unless_zero(&remote->kref))
		remote = NULL;
	rcu_read_unlock();
	if (!remote)
		return NULL;
	flush_work(&remote->attach);
	if (smp_load_acquire(&remote->state) == DMBRIDGE_REMOTE_MAPPED) {
		spin_lock_bh(&dev->remotes_lock);
		if (!hlist_unhashed(&remote->node)) {
			remote->held++;
			memory = remote->memory;
			*size = remote->size;
		}
		spin_unlock_bh(&dev->remotes_lock);
	}
	if (memory)
		dmbridge_count(dev, attached, 1);
	dmbridge_remote_put(remote);
	return memory;
}

void dmbridge_remote_let_go(struct dmbridge *dev, u64 token)
{
	struct dmbridge_remote *remote;

	rcu_read_lock();
	remote = find(dev, token);
	if (remote) {
		spin_lock_bh(&dev->remotes_lock);
		if (remote->held)
			remote->held--;
		spin_unlock_bh(&dev->remotes_lock);
	}
	rcu_read_unlock();
	dmbridge_remote_ended(dev, token);
}

/* The device that owned some is gone. */
void dmbridge_remotes_of_ended(struct dmbridge *dev, u64 owner)
{
	struct dmbridge_remote *remote, *ended[32];
	unsigned int bucket, count;

	do {
		count = 0;
		rcu_read_lock();
		hash_for_each_rcu(dev->remotes, bucket, remote, node) {
			if (count < ARRAY_SIZE(ended) &&
			    smp_load_acquire(&remote->state) == DMBRIDGE_REMOTE_MAPPED &&
			    remote->owner == owner && forget(remote, false))
				ended[count++] = remote;
		}
		rcu_read_unlock();
		let_go(dev, ended, count);
	} while (count == ARRAY_SIZE(ended));
}

void dmbridge_remotes_init(struct dmbridge *dev)
{
	hash_init(dev->remotes);
	INIT_LIST_HEAD(&dev->unmappable);
}

/* After the device was reset; its work has ended. */
void dmbridge_remotes_free(struct dmbridge *dev)
{
	struct dmbridge_remote *remote;
	struct hlist_node *next;
	unsigned int bucket;

	hash_for_each_safe(dev->remotes, bucket, next, remote, node)
		if (forget(remote, true))
			dmbridge_remote_put(remote);
}
