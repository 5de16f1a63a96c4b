/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The device's wire formats, as docs/device.md defines them (the numbers in
 * parentheses are its sections).
 */
#ifndef DMBRIDGE_DEVICE_H
#define DMBRIDGE_DEVICE_H

#include <linux/types.h>

/* (2) Identification. 37 is what QEMU can be told, 44 what the device is. */
#define DMBRIDGE_ID_QEMU		37
#define DMBRIDGE_ID_ISM			44
#define DMBRIDGE_MAGIC			"DMBRIDGE"
#define DMBRIDGE_VERSION_MAJOR		1

/* (3) Feature bits */
#define DMBRIDGE_F_MAP			0
#define DMBRIDGE_F_RAM_DMB		1
#define DMBRIDGE_F_RENDEZVOUS		3
#define DMBRIDGE_F_PRIVATE_LINE		4

/* The number of a size's byte in copy_plan: 256 << i and above */
#define DMBRIDGE_COPY_PLAN		16
#define DMBRIDGE_COPY_VECTOR		1
#define DMBRIDGE_COPY_NONTEMPORAL	2
#define DMBRIDGE_COPY_STRING		3

/* A GID of this version: 64 bits, big-endian, and eight zero bytes (6.1) */
struct dmbridge_gid {
	__be64 id;
	__be64 zero;
} __packed;

/* (4) Configuration space */
struct dmbridge_config {
	u8 magic[8];
	__le16 version_major;
	__le16 version_minor;
	__le16 fabric_id;
	__le16 move_queues;
	struct dmbridge_gid gid;
	u8 system_eid[32];
	__le64 window_size;
	__le64 max_dmb_size;
	__le64 max_dmb_bytes;
	__le32 max_dmbs;
	__le32 max_segments;
	__le64 max_move_size;
	__le32 granule;
	u8 copy_plan[DMBRIDGE_COPY_PLAN];
	__le32 reserved;
} __packed;

/* (5) Virtqueues */
#define DMBRIDGE_CONTROL_QUEUE		0
#define DMBRIDGE_EVENT_QUEUE		1
#define DMBRIDGE_MOVE_QUEUE		2

#define DMBRIDGE_WINDOW_SHMID		1

/* (6) Control queue */
struct dmbridge_command {
	u8 class;
	u8 command;
	u8 reserved[6];
	u8 body[];
} __packed;

struct dmbridge_answer {
	u8 status;
	u8 reserved[7];
	u8 reply[];
} __packed;

/* class in the high byte, command in the low one */
#define DMBRIDGE_QUERY_GID		0x0000
#define DMBRIDGE_RENDEZVOUS		0x0001
#define DMBRIDGE_CANCEL_RENDEZVOUS	0x0002
#define DMBRIDGE_LIFELINE		0x0003
#define DMBRIDGE_REGISTER		0x0100
#define DMBRIDGE_UNREGISTER		0x0101
#define DMBRIDGE_ATTACH			0x0102
#define DMBRIDGE_DETACH			0x0103
#define DMBRIDGE_SIGNAL_EVENT		0x0200

struct dmbridge_query_reply {
	__le32 flags;
	__le32 reserved;
} __packed;

struct dmbridge_rendezvous {
	u8 key[32];
	__le32 tag;
	__le32 reserved;
	u8 payload[32];
} __packed;

/* A zero GID: nobody is there yet, and an event will tell. */
struct dmbridge_rendezvous_reply {
	struct dmbridge_gid gid;
	u8 payload[32];
} __packed;

struct dmbridge_cancel_rendezvous {
	u8 key[32];
	__le32 tag;
	__le32 reserved;
} __packed;

struct dmbridge_segment {
	__le64 addr;
	__le64 len;
} __packed;

#define DMBRIDGE_REGISTER_RAM		1
#define DMBRIDGE_REGISTER_PRIVATE_LINE	2

/* Flags in replies */
#define DMBRIDGE_PAIR_MAP		1
#define DMBRIDGE_PAIR_FUTEX		2
#define DMBRIDGE_PAIR_PRIVATE_LINE	4

struct dmbridge_register {
	struct dmbridge_gid rgid;
	__le64 size;
	__le32 flags;
	__le32 num_segments;
	__le64 line_addr;
	struct dmbridge_segment segments[];
} __packed;

struct dmbridge_register_reply {
	__le64 token;
	__le64 offset;
	__le64 line_offset;
	__le64 size;
	__le32 index;
	__le32 flags;
	__le64 reserved;
} __packed;

struct dmbridge_attach_reply {
	struct dmbridge_gid gid;
	__le64 offset;
	__le64 line_offset;
	__le64 size;
	__le32 flags;
	__le32 reserved;
} __packed;

struct dmbridge_signal_event {
	struct dmbridge_gid rgid;
	__le32 code;
	__le32 reserved;
	__le64 info;
} __packed;

/* (7) Events */
#define DMBRIDGE_EVENT_SIGNAL		1
#define DMBRIDGE_EVENT_UNREGISTERED	2
#define DMBRIDGE_EVENT_DETACHED		3
#define DMBRIDGE_EVENT_GONE		4
#define DMBRIDGE_EVENT_SOFTWARE		5
#define DMBRIDGE_EVENT_EXTENT_ADDED	6
#define DMBRIDGE_EVENT_EXTENT_REMOVED	7
#define DMBRIDGE_EVENT_RENDEZVOUS	8
#define DMBRIDGE_EVENT_PAUSED		9
#define DMBRIDGE_EVENT_RESUMED		10

struct dmbridge_event {
	__le16 type;
	__le16 code;
	__le32 index;
	struct dmbridge_gid gid;
	__le64 token;
	__le64 info;
	__le64 offset;
	__le64 size;
	__le64 reserved;
} __packed;

/*
 * (8) Control line. The peer may write all of it at any time; the driver uses
 * armed and pending only, neither of which can do harm.
 */
#define DMBRIDGE_LINE_SIZE		64
#define DMBRIDGE_ARMED_NO		0
#define DMBRIDGE_ARMED_SIGNAL		1

struct dmbridge_line {
	u32 armed;
	u32 generation;
	atomic64_t pending;
	u64 offset;
	u64 size;
	u64 rung;
	u64 suppressed;
	u64 reserved[2];
};

/* (10) Moves */
#define DMBRIDGE_MOVE_SIGNAL		1
#define DMBRIDGE_MOVE_RING		2

struct dmbridge_move_header {
	__le64 token;
	__le64 offset;
	__le64 mask;
	__le32 flags;
	__le32 reserved;
} __packed;

#endif /* DMBRIDGE_DEVICE_H */
