/*
 * dmbridge: memory that one program reads and another one, in another virtual machine, container or process of the
 * same host, writes; and sockets over it. See docs/c-api.md.
 *
 * Functions that return int give 0 (or what they document) on success and -1 with errno on failure; functions that
 * return a pointer give NULL with errno on failure. dmbridge_error() then has a sentence about it.
 *
 * Any thread may use any object; who frees one sees to it that no other thread uses it any more. NULL may be freed.
 */

#ifndef DMBRIDGE_H
#define DMBRIDGE_H

/* Made by cbindgen from guest-driver/capi/src: change it there. */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/**
 * The owner of a DMB ended it.
 */
#define DMBRIDGE_EVENT_DMB_UNREGISTERED 2

/**
 * The peer of a DMB let it go.
 */
#define DMBRIDGE_EVENT_DMB_DETACHED 3

/**
 * A device with which this one shared a DMB is gone.
 */
#define DMBRIDGE_EVENT_DEVICE_GONE 4

/**
 * Somebody called dmbridge_signal_event().
 */
#define DMBRIDGE_EVENT_SOFTWARE 5

/**
 * A device with which this one shared a DMB is paused; nothing is lost.
 */
#define DMBRIDGE_EVENT_DEVICE_PAUSED 9

/**
 * It goes on.
 */
#define DMBRIDGE_EVENT_DEVICE_RESUMED 10

/**
 * For dmbridge_stream_arm(): reading.
 */
#define DMBRIDGE_READ 1

/**
 * For dmbridge_stream_arm(): writing.
 */
#define DMBRIDGE_WRITE 2

/**
 * A device of this process.
 */
struct dmbridge_device;

/**
 * A DMB that this process owns: the peer writes, this process reads.
 */
struct dmbridge_dmb;

/**
 * A socket that listens.
 */
struct dmbridge_listener;

/**
 * A way to have the device copy into a DMB, where it cannot be attached.
 */
struct dmbridge_mover;

/**
 * A DMB that this process has attached: this process writes, the owner reads.
 */
struct dmbridge_remote_dmb;

/**
 * What sockets need: devices, and buffers that connections share.
 */
struct dmbridge_smc;

/**
 * A connection.
 */
struct dmbridge_stream;

/**
 * A device's name in the fabric.
 */
struct dmbridge_gid {
    /**
     * As in docs/device.md, 6.1.
     */
    uint8_t bytes[16];
};

/**
 * Something that happened.
 */
struct dmbridge_event {
    /**
     * One of DMBRIDGE_EVENT_...
     */
    uint32_t kind;
    /**
     * DMBRIDGE_EVENT_SOFTWARE: the sender's code. DMBRIDGE_EVENT_DEVICE_GONE: the reason.
     */
    uint32_t code;
    /**
     * The other device.
     */
    struct dmbridge_gid gid;
    /**
     * The DMB's token, where the event is about one.
     */
    uint64_t token;
    /**
     * DMBRIDGE_EVENT_SOFTWARE: the sender's info.
     */
    uint64_t info;
};

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * Connects a device to a daemon's socket: its hub, or that of a configured device.
 */
struct dmbridge_device *dmbridge_device_connect(const char *path);

/**
 * Lets go of a device. It leaves the fabric when everything that was made from it is freed, too.
 */
void dmbridge_device_free(struct dmbridge_device *device);

/**
 * The device's name in the fabric; all zero, with errno, on failure.
 */
struct dmbridge_gid dmbridge_device_gid(const struct dmbridge_device *device);

/**
 * Whether DMBs of this device can be mapped: 1 or 0.
 */
int dmbridge_device_can_map(const struct dmbridge_device *device);

/**
 * Reads a GID from 1 to 16, or 32, hexadecimal digits.
 */
int dmbridge_gid_parse(const char *digits, struct dmbridge_gid *gid);

/**
 * Says something to another device's program, which gets DMBRIDGE_EVENT_SOFTWARE. EAGAIN: it has not taken 64 of them.
 */
int dmbridge_signal_event(const struct dmbridge_device *device,
                          struct dmbridge_gid gid,
                          uint32_t code,
                          uint64_t info);

/**
 * Waits up to `timeout_ms` (negative: for ever) for the next event of the device: 1, or 0 if none came in time.
 */
int dmbridge_next_event(const struct dmbridge_device *device,
                        int timeout_ms,
                        struct dmbridge_event *event);

/**
 * Registers a DMB of `size` bytes, a multiple of 4096, that the device `peer` may write. Its memory is zero.
 */
struct dmbridge_dmb *dmbridge_register(const struct dmbridge_device *device,
                                       struct dmbridge_gid peer,
                                       size_t size);

/**
 * Unregisters a DMB.
 */
void dmbridge_dmb_free(struct dmbridge_dmb *dmb);

/**
 * The DMB's name, to be told to the peer; 0, with errno, on failure.
 */
uint64_t dmbridge_dmb_token(const struct dmbridge_dmb *dmb);

/**
 * The DMB's memory, of the size that was registered. The peer changes it at any time: read each value once, by volatile or atomic
 * accesses, check it, and use what was checked.
 */
void *dmbridge_dmb_memory(const struct dmbridge_dmb *dmb);

/**
 * Copies `len` bytes from the DMB, from `offset` on.
 */
int dmbridge_dmb_read(const struct dmbridge_dmb *dmb, size_t offset, uint8_t *to, size_t len);

/**
 * Waits up to `timeout_ms` (negative: for ever) until the peer signals, and takes the bits into `bits`, 0 if it did not in time.
 * What the peer wrote before is there. ECONNRESET: the peer is gone and no signal is left.
 */
int dmbridge_dmb_wait(const struct dmbridge_dmb *dmb,
                      int timeout_ms,
                      uint64_t *bits);

/**
 * For poll() and the like: asks that the descriptor of dmbridge_dmb_fd() become readable at the next signal. Look again after this,
 * by dmbridge_dmb_wait() with a timeout of 0, before you wait. Once per call.
 */
int dmbridge_dmb_arm(const struct dmbridge_dmb *dmb);

/**
 * The descriptor for dmbridge_dmb_arm(). It belongs to the DMB; watch it for reading only.
 */
int dmbridge_dmb_fd(const struct dmbridge_dmb *dmb);

/**
 * Attaches a DMB whose peer this device is. EOPNOTSUPP: a mover is the way.
 */
struct dmbridge_remote_dmb *dmbridge_attach(const struct dmbridge_device *device, uint64_t token);

/**
 * Detaches a DMB.
 */
void dmbridge_remote_dmb_free(struct dmbridge_remote_dmb *dmb);

/**
 * The DMB's size in bytes; 0, with errno, on failure.
 */
size_t dmbridge_remote_dmb_size(const struct dmbridge_remote_dmb *dmb);

/**
 * The DMB's memory: what is stored here is what the owner reads.
 */
void *dmbridge_remote_dmb_memory(const struct dmbridge_remote_dmb *dmb);

/**
 * Copies `len` bytes into the DMB, from `offset` on, the fastest way that this host has. Does not tell the owner.
 */
int dmbridge_remote_dmb_write(const struct dmbridge_remote_dmb *dmb,
                              size_t offset,
                              const uint8_t *from,
                              size_t len);

/**
 * Sets bits in the owner's mask, and wakes the owner if it sleeps. What was stored before is visible before.
 */
int dmbridge_remote_dmb_signal(const struct dmbridge_remote_dmb *dmb, uint64_t bits);

/**
 * A mover into a DMB whose peer this device is.
 */
struct dmbridge_mover *dmbridge_mover_open(const struct dmbridge_device *device, uint64_t token);

/**
 * Lets go of a mover.
 */
void dmbridge_mover_free(struct dmbridge_mover *mover);

/**
 * Has the device copy `len` bytes into the DMB, from `offset` on, and then set `bits` in the owner's mask, if there are any, and wake it.
 * Returns when that is done.
 */
int dmbridge_move(const struct dmbridge_mover *mover,
                  uint64_t offset,
                  const uint8_t *from,
                  size_t len,
                  uint64_t bits);

/**
 * A sentence about the last failure of a function of this library in this thread; "" if there was none. Valid until the
 * thread's next failure.
 */
const char *dmbridge_error(void);

/**
 * Sockets over these devices, the favourite first. Without a device, every connection stays with TCP. The devices can be freed after this.
 */
struct dmbridge_smc *dmbridge_smc_new(const struct dmbridge_device *const *devices,
                                      size_t count);

/**
 * Sockets over a device of each hub that the environment variable DMBRIDGE_HUB names (paths with colons between), or of
 * /run/dmbridge/hub.sock. A hub that cannot be connected is left out.
 */
struct dmbridge_smc *dmbridge_smc_from_environment(void);

/**
 * Lets go. Listeners and connections stay.
 */
void dmbridge_smc_free(struct dmbridge_smc *smc);

/**
 * Listens at an address such as "0.0.0.0:7000", "[::1]:7000" or "localhost:0".
 */
struct dmbridge_listener *dmbridge_listen(const struct dmbridge_smc *smc, const char *address);

/**
 * Stops listening.
 */
void dmbridge_listener_free(struct dmbridge_listener *listener);

/**
 * The port that it listens at.
 */
int dmbridge_listener_port(const struct dmbridge_listener *listener);

/**
 * A descriptor that is readable while there is something to accept. It belongs to the listener; watch it for reading only.
 */
int dmbridge_listener_fd(const struct dmbridge_listener *listener);

/**
 * Whether dmbridge_accept() fails with EAGAIN instead of waiting.
 */
int dmbridge_listener_set_nonblocking(const struct dmbridge_listener *listener, bool nonblocking);

/**
 * The next connection.
 */
struct dmbridge_stream *dmbridge_accept(const struct dmbridge_listener *listener);

/**
 * Connects to an address such as "127.0.0.1:7000", where a program listens that speaks SMC.
 */
struct dmbridge_stream *dmbridge_connect(const struct dmbridge_smc *smc, const char *address);

/**
 * Closes a connection.
 */
void dmbridge_stream_free(struct dmbridge_stream *stream);

/**
 * Whether it goes over DMBs: 1 or 0.
 */
int dmbridge_stream_is_smc(const struct dmbridge_stream *stream);

/**
 * Why it stayed with TCP, as one of Linux's SMC_CLC_DECL_ codes; 0 if it did not.
 */
uint32_t dmbridge_stream_fallback_reason(const struct dmbridge_stream *stream);

/**
 * Reads up to `len` bytes: how many; 0 at the end. As read(2).
 */
ptrdiff_t dmbridge_stream_read(const struct dmbridge_stream *stream, uint8_t *to, size_t len);

/**
 * As dmbridge_stream_read(), and leaves the bytes there.
 */
ptrdiff_t dmbridge_stream_peek(const struct dmbridge_stream *stream, uint8_t *to, size_t len);

/**
 * Writes: how many bytes; less than `len` only if it may not wait any longer. As write(2), without SIGPIPE.
 */
ptrdiff_t dmbridge_stream_write(const struct dmbridge_stream *stream, const uint8_t *from, size_t len);

/**
 * Ends directions: `how` is SHUT_RD, SHUT_WR or SHUT_RDWR.
 */
int dmbridge_stream_shutdown(const struct dmbridge_stream *stream, int how);

/**
 * Whether what would wait fails with EAGAIN instead.
 */
int dmbridge_stream_set_nonblocking(const struct dmbridge_stream *stream, bool nonblocking);

/**
 * How long reading and writing wait before they fail with EAGAIN, in milliseconds; 0: for ever.
 */
int dmbridge_stream_set_timeouts(const struct dmbridge_stream *stream, uint32_t read_ms, uint32_t write_ms);

/**
 * For poll() and the like: of DMBRIDGE_READ and DMBRIDGE_WRITE in `what`, those that can be done at once, in `ready`. If that is not
 * what is wanted, poll the descriptor of dmbridge_stream_fd() and ask again. Over DMBs the descriptor is to be polled for POLLIN in any
 * case; over TCP (dmbridge_stream_is_smc()) as a socket, and `ready` is always 0.
 */
int dmbridge_stream_arm(const struct dmbridge_stream *stream,
                        int what,
                        int *ready);

/**
 * The descriptor for dmbridge_stream_arm(). It belongs to the connection.
 */
int dmbridge_stream_fd(const struct dmbridge_stream *stream);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* DMBRIDGE_H */
