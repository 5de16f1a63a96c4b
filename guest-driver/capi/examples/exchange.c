/*
 * Two devices of one process exchange data in every way that there is: by map, by move, and over a socket.
 *
 *     cc exchange.c $(pkg-config --cflags --libs dmbridge) -o exchange
 *     ./exchange /run/dmbridge/hub.sock
 */
#include <dmbridge.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

/* Ends the program with a sentence unless something is as it should be. */
static void check(int good, const char *what)
{
    if (!good) {
        fprintf(stderr, "%s: %s\n", what, dmbridge_error());
        exit(1);
    }
}

/* The owner registers, the peer attaches and writes, and tells. */
static void by_map(struct dmbridge_device *reader, struct dmbridge_device *writer)
{
    struct dmbridge_dmb *dmb = dmbridge_register(reader, dmbridge_device_gid(writer), 65536);
    check(dmb != NULL, "dmbridge_register");

    struct dmbridge_remote_dmb *remote = dmbridge_attach(writer, dmbridge_dmb_token(dmb));
    check(remote != NULL, "dmbridge_attach");
    check(dmbridge_remote_dmb_size(remote) == 65536, "dmbridge_remote_dmb_size");
    check(dmbridge_remote_dmb_write(remote, 100, (const uint8_t *)"by map", 6) == 0, "dmbridge_remote_dmb_write");
    check(dmbridge_remote_dmb_signal(remote, 5) == 0, "dmbridge_remote_dmb_signal");

    uint64_t bits;
    uint8_t text[6];
    check(dmbridge_dmb_wait(dmb, -1, &bits) == 0 && bits == 5, "dmbridge_dmb_wait");
    check(dmbridge_dmb_read(dmb, 100, text, sizeof text) == 0, "dmbridge_dmb_read");
    printf("%.6s\n", (const char *)text);

    /* A store here is a load there. */
    *(volatile uint32_t *)dmbridge_remote_dmb_memory(remote) = 42;
    check(*(volatile uint32_t *)dmbridge_dmb_memory(dmb) == 42, "a store");

    dmbridge_remote_dmb_free(remote);
    dmbridge_dmb_free(dmb);
}

/* The peer has the device copy. */
static void by_move(struct dmbridge_device *reader, struct dmbridge_device *writer)
{
    struct dmbridge_dmb *dmb = dmbridge_register(reader, dmbridge_device_gid(writer), 4096);
    check(dmb != NULL, "dmbridge_register");
    struct dmbridge_mover *mover = dmbridge_mover_open(writer, dmbridge_dmb_token(dmb));
    check(mover != NULL, "dmbridge_mover_open");
    check(dmbridge_move(mover, 8, (const uint8_t *)"by move", 7, 1) == 0, "dmbridge_move");

    uint64_t bits;
    uint8_t text[7];
    check(dmbridge_dmb_wait(dmb, -1, &bits) == 0 && bits == 1, "dmbridge_dmb_wait");
    check(dmbridge_dmb_read(dmb, 8, text, sizeof text) == 0, "dmbridge_dmb_read");
    printf("%.7s\n", (const char *)text);

    dmbridge_mover_free(mover);
    dmbridge_dmb_free(dmb);
}

/* Answers one client. */
static void *serve(void *listener)
{
    struct dmbridge_stream *stream = dmbridge_accept(listener);
    check(stream != NULL, "dmbridge_accept");
    uint8_t text[64];
    ssize_t len;
    while ((len = dmbridge_stream_read(stream, text, sizeof text)) > 0)
        check(dmbridge_stream_write(stream, text, (size_t)len) == len, "dmbridge_stream_write");
    check(len == 0, "dmbridge_stream_read");
    dmbridge_stream_free(stream);
    return NULL;
}

/* As TCP's sockets. */
static void by_socket(struct dmbridge_device *one, struct dmbridge_device *other)
{
    const struct dmbridge_device *ones[] = {one}, *others[] = {other};
    struct dmbridge_smc *server = dmbridge_smc_new(ones, 1), *client = dmbridge_smc_new(others, 1);
    check(server != NULL && client != NULL, "dmbridge_smc_new");
    struct dmbridge_listener *listener = dmbridge_listen(server, "127.0.0.1:0");
    check(listener != NULL, "dmbridge_listen");
    pthread_t thread;
    check(pthread_create(&thread, NULL, serve, listener) == 0, "pthread_create");

    char address[32];
    snprintf(address, sizeof address, "127.0.0.1:%d", dmbridge_listener_port(listener));
    struct dmbridge_stream *stream = dmbridge_connect(client, address);
    check(stream != NULL, "dmbridge_connect");
    check(dmbridge_stream_is_smc(stream) == 1, "it goes over DMBs");
    check(dmbridge_stream_fallback_reason(stream) == 0, "dmbridge_stream_fallback_reason");
    check(dmbridge_stream_write(stream, (const uint8_t *)"by socket", 9) == 9, "dmbridge_stream_write");
    check(dmbridge_stream_shutdown(stream, SHUT_WR) == 0, "dmbridge_stream_shutdown");
    uint8_t text[64];
    size_t len = 0;
    ssize_t got;
    while ((got = dmbridge_stream_read(stream, text + len, sizeof text - len)) > 0)
        len += (size_t)got;
    check(got == 0, "dmbridge_stream_read");
    printf("%.*s\n", (int)len, (const char *)text);

    dmbridge_stream_free(stream);
    pthread_join(thread, NULL);
    dmbridge_listener_free(listener);
    dmbridge_smc_free(client);
    dmbridge_smc_free(server);
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: %s HUB\n", argv[0]);
        return 2;
    }
    struct dmbridge_device *reader = dmbridge_device_connect(argv[1]);
    check(reader != NULL, "dmbridge_device_connect");
    struct dmbridge_device *writer = dmbridge_device_connect(argv[1]);
    check(writer != NULL, "dmbridge_device_connect");
    by_map(reader, writer);
    by_move(reader, writer);
    by_socket(reader, writer);
    dmbridge_device_free(writer);
    dmbridge_device_free(reader);
    return 0;
}
