/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Inside the driver: what its parts have in common.
 *
 *	main.c		finding, starting and ending a device
 *	control.c	the control queue
 *	event.c		the event queue
 *	move.c		the move queues
 *	dmb.c		DMBs that this device owns, and who is told of their signals
 *	remote.c	DMBs of others into which this device writes
 *	copy.c		stores into the window
 *	smc.c		the device as an SMC-D device of Linux up to 6.2
 *	dibs.c		the device as a dibs device of Linux from 6.18 on
 *	chardev.c	DMBs for programs
 *
 * Who calls whom: main.c starts all; smc.c and chardev.c call dmb.c and
 * remote.c; these call control.c and move.c; event.c tells all of them.
 *
 * Nothing that a device says is believed: what could make this driver touch
 * memory that is not the device's, wait for ever, or take two things for one is
 * checked, and a device that breaks its contract is not used any more
 * (dmbridge_break()).
 */
#ifndef DMBRIDGE_H
#define DMBRIDGE_H

#include <linux/completion.h>
#include <linux/hashtable.h>
#include <linux/interrupt.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/percpu.h>
#include <linux/rcupdate.h>
#include <linux/sizes.h>
#include <linux/spinlock.h>
#include <linux/version.h>
#include <linux/virtio.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include "device.h"

#ifdef __BIG_ENDIAN
#error "dmbridge: control lines are little-endian, and this driver uses them as they are"
#endif
#if PAGE_SIZE != SZ_4K
#error "dmbridge: what a program maps is cut in pages of 4 KiB, as the device cuts it"
#endif

/*
 * How a device joins SMC. Up to Linux 6.2, smc.ko lets any in; from 6.18 on it is
 * a client of dibs, and so are others; between, it takes those of s390 only.
 */
#if IS_ENABLED(CONFIG_SMC) && LINUX_VERSION_CODE < KERNEL_VERSION(6, 3, 0)
#define DMBRIDGE_SMCD	1
#elif (IS_ENABLED(CONFIG_DIBS) || defined(DMBRIDGE_TRY_DIBS)) && \
	LINUX_VERSION_CODE >= KERNEL_VERSION(6, 18, 0)
#define DMBRIDGE_DIBS	1
#endif

/* A device that owes an answer for so long is not used any more. */
#define DMBRIDGE_PATIENCE_MS		10000
/* Move queues that are used at most, however many the device has. */
#define DMBRIDGE_MAX_MOVE_QUEUES	8
/* Moves under way in one queue. */
#define DMBRIDGE_MOVE_SLOTS		64
/* Data that a move takes along, so that its sender need not wait for it. */
#define DMBRIDGE_MOVE_INLINE		64
/* Pieces of one move's data. */
#define DMBRIDGE_MOVE_PIECES		16
/* A program's data is moved from a copy, of so much at a time. */
#define DMBRIDGE_BOUNCE			SZ_256K
/* Event buffers. */
#define DMBRIDGE_EVENTS			128
/*
 * DMBs that SMC is told it may have: it keeps a pointer for each, in one piece of
 * memory, and dibs asks once for all devices. A device numbers from 0 on.
 */
#define DMBRIDGE_SMC_DMBS		16384

struct dmbridge;
struct dmbridge_chardev;
struct dibs_dev;
struct smcd_dev;

/* Configuration, checked and in the CPU's byte order */
struct dmbridge_limits {
	u16 fabric_id;
	u16 move_queues;
	u64 gid;
	u8 system_eid[32];
	u64 window_size;
	u64 max_dmb_size;
	u32 max_dmbs;
	u32 max_segments;
	u64 max_move_size;
	u8 copy_plan[DMBRIDGE_COPY_PLAN];
};

struct dmbridge_control {
	struct virtqueue *vq;
	/* Who has it may have one command under way. */
	struct mutex mutex;
	/* The queue itself, against its interrupt. */
	spinlock_t lock;
	struct completion answered;
	struct dmbridge_command *request;
	size_t request_room;
	struct dmbridge_answer *answer;
	u32 answer_len;
};

struct dmbridge_event_buffer {
	struct dmbridge_event event;
	struct list_head list;
};

struct dmbridge_events {
	struct virtqueue *vq;
	/* The queue, and the list. */
	spinlock_t lock;
	struct dmbridge_event_buffer *buffers;
	/* Events that are not signals, to be handled by work. */
	struct list_head waiting;
	struct work_struct work;
};

/* A move under way: what the device reads and writes, then what is ours. */
struct dmbridge_slot {
	struct dmbridge_move_header header;
	u8 data[DMBRIDGE_MOVE_INLINE];
	u8 status[8];
	struct list_head free;
	/* Who waits for it, or NULL. */
	struct dmbridge_wait *wait;
	/* Who wants to know that it failed, or NULL. */
	struct dmbridge_remote *remote;
	/* The copy that it is made from, if nobody waits for it any more, or NULL. */
	void *bounce;
	unsigned long posted;
};

struct dmbridge_moves {
	struct dmbridge *dev;
	struct virtqueue *vq;
	spinlock_t lock;
	struct dmbridge_slot *slots;
	struct list_head free;
	unsigned int busy;
};

/*
 * struct dmbridge_dmb - a DMB that this device owns
 * @signal:	called when the peer has signalled, in any context, with
 *		interrupts off; it must not unregister
 * @is_programs: its control line is a program's, and left alone here
 * @attending:	in the list of DMBs whose line is to be armed again
 */
struct dmbridge_dmb {
	struct dmbridge *dev;
	u64 token;
	u32 index;
	u64 peer;
	size_t size;
	void *memory;
	struct dmbridge_line *line;
	/* Place in the window; of no meaning for one in RAM. */
	u64 offset;
	u64 line_offset;
	bool ram;
	bool is_programs;
	u32 flags;
	void (*signal)(struct dmbridge_dmb *dmb, u64 mask);
	void *owner;
	struct list_head attending;
};

enum dmbridge_remote_state {
	/* Nobody has tried to attach it yet: moves. */
	DMBRIDGE_REMOTE_NEW,
	/* Attached: stores. */
	DMBRIDGE_REMOTE_MAPPED,
	/* Cannot be attached: moves, for good. */
	DMBRIDGE_REMOTE_MOVES,
};

/* A DMB of another device into which this one writes, on behalf of SMC. */
struct dmbridge_remote {
	struct dmbridge *dev;
	struct kref kref;
	struct rcu_head rcu;
	struct hlist_node node;
	struct list_head unmappable;
	struct work_struct attach;
	u64 token;
	enum dmbridge_remote_state state;
	u64 owner;
	u64 size;
	void *memory;
	struct dmbridge_line *line;
	/* So many have its address, and say when they do not need it any more. */
	unsigned int held;
	/* Moves that nobody waits for. */
	atomic_t inflight;
	/* What became of them, if not good. */
	int error;
};

struct dmbridge_stats {
	u64 commands;
	u64 events;
	u64 signals;
	u64 mapped_writes;
	u64 mapped_bytes;
	u64 moves;
	u64 moved_bytes;
	u64 rings;
	u64 suppressed;
	u64 polled;
	u64 attached;
};

/**
 * struct dmbridge - a device
 * @state:	DMBRIDGE_BROKEN: it is not used any more. DMBRIDGE_GOING: the driver
 *		lets go of it.
 * @dmbs_lock:	protects @dmbs, @attend_list and what hangs on them; taken with
 *		interrupts off
 * @dmbs:	by index
 * @graves:	memory that the device may still write to; freed after its reset
 * @wq:		one thing after the other: events (but signals) and attaches
 */
struct dmbridge {
	struct virtio_device *vdev;
	struct dmbridge_limits limits;
	unsigned long state;
	bool can_map;
	bool can_ram;
	bool can_private_line;
	phys_addr_t window_phys;
	void *window;

	/* Not zero while this driver wants the device to be as it is. */
	__le32 *lifeline;

	struct dmbridge_control control;
	struct dmbridge_events events;
	struct dmbridge_moves *moves;
	unsigned int move_queues;
	struct delayed_work watchdog;
	/* Devices that are paused: moves to them may wait for as long. By the work. */
	struct list_head paused;
	atomic_t num_paused;
	/* DMBs of this device: as long as there are some, it is watched. */
	atomic_t live;

	spinlock_t dmbs_lock;
	struct dmbridge_dmb **dmbs;
	struct list_head attend_list;
	struct tasklet_struct attend;
	struct list_head graves;

	spinlock_t remotes_lock;
	DECLARE_HASHTABLE(remotes, 10);
	struct list_head unmappable;
	unsigned int num_unmappable;

	struct workqueue_struct *wq;
	struct work_struct broken;
	struct smcd_dev *smcd;
	struct dibs_dev *dibs;
	struct dmbridge_chardev *chardev;
	struct dmbridge_stats __percpu *stats;
};

enum { DMBRIDGE_BROKEN, DMBRIDGE_GOING };

#define dmbridge_count(dev, what, n)	this_cpu_add((dev)->stats->what, n)

static inline bool dmbridge_is_broken(struct dmbridge *dev)
{
	return test_bit(DMBRIDGE_BROKEN, &dev->state);
}

static inline struct dmbridge_gid dmbridge_gid(u64 id)
{
	return (struct dmbridge_gid){ .id = cpu_to_be64(id) };
}

/* A GID as a number; 0, which is no device, if it is none of 64 bits. */
static inline u64 dmbridge_gid_id(const struct dmbridge_gid *gid)
{
	return gid->zero ? 0 : be64_to_cpu(gid->id);
}

/* main.c */
void dmbridge_break(struct dmbridge *dev, const char *why);
void dmbridge_flush(struct dmbridge *dev);

/* control.c */
int dmbridge_control_init(struct dmbridge *dev, struct virtqueue *vq);
void dmbridge_control_free(struct dmbridge *dev);
void dmbridge_control_interrupt(struct virtqueue *vq);
int dmbridge_command(struct dmbridge *dev, u16 what, const void *body, size_t body_len,
		     void *reply, size_t reply_len);

/* event.c */
int dmbridge_events_init(struct dmbridge *dev, struct virtqueue *vq);
void dmbridge_events_free(struct dmbridge *dev);
void dmbridge_events_interrupt(struct virtqueue *vq);
void dmbridge_events_start(struct dmbridge *dev);

/* move.c */
int dmbridge_moves_init(struct dmbridge *dev, struct virtqueue **vqs);
void dmbridge_moves_free(struct dmbridge *dev);
int dmbridge_move(struct dmbridge *dev, u64 token, u64 offset, const void *data, size_t size,
		  u64 mask, struct dmbridge_remote *remote);
int dmbridge_move_and_wait(struct dmbridge *dev, u64 token, u64 offset, void **bounce,
			   size_t size, u32 flags, u64 mask);
int dmbridge_ring(struct dmbridge *dev, u64 token);
void dmbridge_watch(struct dmbridge *dev);
int dmbridge_moves_drain(struct dmbridge_remote *remote);

/* dmb.c */
void dmbridge_dmbs_init(struct dmbridge *dev);
void dmbridge_dmbs_free(struct dmbridge *dev);
struct dmbridge_dmb *dmbridge_register(struct dmbridge *dev, u64 peer, size_t size,
				       void (*signal)(struct dmbridge_dmb *, u64), void *owner);
struct dmbridge_dmb *dmbridge_register_for(struct dmbridge *dev, u64 peer, size_t size,
					   void (*signal)(struct dmbridge_dmb *, u64), void *owner);
void dmbridge_unregister(struct dmbridge_dmb *dmb);
void dmbridge_signalled(struct dmbridge *dev, u32 index, u64 token);
bool dmbridge_in_window(struct dmbridge *dev, u64 offset, u64 size, u64 line_offset);

/* remote.c */
void dmbridge_remotes_init(struct dmbridge *dev);
void dmbridge_remotes_free(struct dmbridge *dev);
int dmbridge_write(struct dmbridge *dev, u64 token, u64 offset, const void *data, size_t size,
		   bool signal);
void *dmbridge_remote_hold(struct dmbridge *dev, u64 token, u64 *size);
void dmbridge_remote_let_go(struct dmbridge *dev, u64 token);
void dmbridge_remote_ended(struct dmbridge *dev, u64 token);
void dmbridge_remotes_of_ended(struct dmbridge *dev, u64 owner);
bool dmbridge_remote_is_known(struct dmbridge *dev, u64 token);
void dmbridge_remote_put(struct dmbridge_remote *remote);

/* copy.c */
void dmbridge_copy_calibrate(void);
void dmbridge_copy(struct dmbridge *dev, void *to, const void *from, size_t size);

/* smc.c, or dibs.c */
int dmbridge_smc_add(struct dmbridge *dev);
void dmbridge_smc_remove(struct dmbridge *dev);
void dmbridge_smc_gone(struct dmbridge *dev, u64 gid);
void dmbridge_smc_unregistered(struct dmbridge *dev, u64 gid, u64 token);
void dmbridge_smc_software(struct dmbridge *dev, u64 gid, u32 code, u64 info);

/* chardev.c */
int dmbridge_chardev_add(struct dmbridge *dev);
void dmbridge_chardev_remove(struct dmbridge *dev);
void dmbridge_chardev_broken(struct dmbridge *dev);
void dmbridge_chardev_event(struct dmbridge *dev, const struct dmbridge_event *event);

#endif /* DMBRIDGE_H */
