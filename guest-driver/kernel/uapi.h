/* SPDX-License-Identifier: (GPL-2.0 WITH Linux-syscall-note) OR BSD-3-Clause */
/*
 * What programs of a guest see: the character device /dev/dmbridgeN.
 *
 * Each open file is a driver of its own for docs/device.md's device, as far as it
 * concerns DMBs: it asks by the commands of the control queue, reads the events of
 * the event queue, and moves by the headers of the move queue. What differs:
 *
 *  - DMBs appear not in the device's window but in the file's: offsets in replies
 *    are offsets to mmap(). A DMB's mapping is its control line's page and the DMB
 *    after it, shared, and nothing else may be mapped. When the DMB has ended, or the
 *    device is gone, its mapping shows pages of the file's own, zero at first.
 *  - REGISTER knows no RAM (the driver uses its own where the device cannot map)
 *    and gives every control line a page of its own. ATTACH answers EOPNOTSUPP if
 *    the DMB's owner did not do so: move then.
 *  - What belongs to one file cannot be used by another one, and ends with it.
 *  - A move needs no attach, but a token belongs to the file that attached it or made
 *    the first move to it: others' moves get EBUSY, and their ATTACH EALREADY. Of tokens
 *    that are not attached, a file keeps the 8192 that it used last.
 *  - SIGNAL_EVENT takes codes from DMBRIDGE_FIRST_CODE on. The others are SMC's.
 *    Every open file reads the events of the former.
 *  - A key of RENDEZVOUS is its file's, and so is its tag: no other file reads its
 *    event or cancels it. EDQUOT from DMBRIDGE_MAX_KEYS keys on that wait for one
 *    file, or 1024 for all. Two files of one guest meet as two devices do; both have
 *    the guest's GID.
 *  - A file can leave wills (DMBRIDGE_LEAVE_WILL), by which a peer learns of the end
 *    of a program that could not say anything any more.
 */
#ifndef DMBRIDGE_UAPI_H
#define DMBRIDGE_UAPI_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define DMBRIDGE_FIRST_CODE	0x10000
#define DMBRIDGE_MAX_KEYS	256
#define DMBRIDGE_MAX_WILLS	8192

/**
 * struct dmbridge_info - DMBRIDGE_INFO: what the file is
 * @version: 1
 * @max_slots: DMBs, owned and attached, of all files
 * @features: the device's feature bits that hold for the file
 * @config: the device's configuration space; window_size is the file's
 */
struct dmbridge_info {
	__u32 version;
	__u32 max_slots;
	__aligned_u64 features;
	__u8 config[128];
};

/**
 * struct dmbridge_request - DMBRIDGE_COMMAND: a command and its answer
 * @command: address of the command: header and body
 * @answer: address of the room for its answer: status and reply
 * @command_len: bytes
 * @answer_len: bytes
 *
 * The ioctl returns the used length of the answer, 8 or more; the answer's first
 * byte says whether it succeeded.
 */
struct dmbridge_request {
	__aligned_u64 command;
	__aligned_u64 answer;
	__u32 command_len;
	__u32 answer_len;
};

/**
 * struct dmbridge_move - DMBRIDGE_MOVE: a move
 * @header: as on a move queue
 * @pieces: address of an array of struct iovec, the data
 * @num_pieces: of them
 *
 * Has been done when the ioctl returns; its error is the device's.
 */
struct dmbridge_move {
	__u8 header[32];
	__aligned_u64 pieces;
	__u32 num_pieces;
	__u32 reserved;
};

/**
 * struct dmbridge_will - DMBRIDGE_LEAVE_WILL: a move to be made when the file is closed
 * @token: a DMB that the file has attached or moved to
 * @offset: in it
 * @mask: the owner's bits to set afterwards, not 0
 * @data: what is moved
 * @len: bytes of it, from 1 on
 * @reserved: 0
 *
 * The ioctl returns the will's number, from 1 on. The move is made when the last
 * descriptor and mapping of the file have gone, also with a process that is killed,
 * unless DMBRIDGE_WITHDRAW_WILL, whose argument is the number itself, came before, or
 * the token is the file's no more. It comes after all that the file has moved, and
 * after what was stored. A device that is taken away makes none.
 *
 * ENOENT: the token is not the file's, or there is no will of that number. EDQUOT:
 * DMBRIDGE_MAX_WILLS of the file are there.
 */
struct dmbridge_will {
	__aligned_u64 token;
	__aligned_u64 offset;
	__aligned_u64 mask;
	__u8 data[8];
	__u32 len;
	__u32 reserved;
};

#define DMBRIDGE_INFO		_IOR(0xdb, 0, struct dmbridge_info)
#define DMBRIDGE_COMMAND	_IOW(0xdb, 1, struct dmbridge_request)
#define DMBRIDGE_MOVE		_IOW(0xdb, 2, struct dmbridge_move)
#define DMBRIDGE_LEAVE_WILL	_IOW(0xdb, 3, struct dmbridge_will)
#define DMBRIDGE_WITHDRAW_WILL	_IO(0xdb, 4)

#endif /* DMBRIDGE_UAPI_H */
