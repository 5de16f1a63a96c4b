//! Connections that have moved and then go to another program, which knows nothing of that: no byte is lost, doubled or in
//! another place, whoever reads it.

use dmbridge_tests::preload::{Ran, Way, daemon};

/// The server accepts a connection, uses it until it has moved, reads a little of what the client sends then, and hands it on.
const SERVER: &str = r#"
import hashlib, os, socket, subprocess, sys, time
how, moves, big, heir = sys.argv[1], sys.argv[2] == 'moves', int(sys.argv[3]), sys.argv[5]
# It moves while the client sends and nobody reads.
early = how == 'early'
if early: how = 'stdin'
listener = socket.create_server(('127.0.0.1', 0))
client = subprocess.Popen([sys.executable, '-c', sys.argv[4], str(listener.getsockname()[1]), str(big), str(early)],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE)
s, _ = listener.accept()
def exactly(n):
    data = b''
    while len(data) < n: data += s.recv(n - len(data))
    return data
def by_tcp():
    return int.from_bytes(s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)[128:136], 'little')
end = time.monotonic() + 30
rounds = 0
while True:
    before = by_tcp()
    s.sendall(b'c')
    exactly(1000)
    rounds += 1
    if early and rounds == 20: break
    if rounds > 50 and (not moves or by_tcp() - before < 500): break
    assert time.monotonic() < end, 'it does not move'
s.sendall(b'g')
first = exactly(777)
if early: heir = heir.replace('big = ', 'big = %d #' % int(client.stdout.readline()))
os.set_inheritable(s.fileno(), True)
def run(fd, **more):
    return subprocess.Popen([sys.executable, '-c', heir, str(fd), hashlib.sha256(first).hexdigest()], **more)
if how == 'exec':
    # The client ends by itself; nobody here waits for it.
    pid = os.fork()
    if pid == 0:
        s.close()
        print(client.communicate()[0].decode(), end='')
        sys.stdout.flush()
        os._exit(0)
    client.stdin.close(); client.stdout.close()
    os.execv(sys.executable, [sys.executable, '-c', heir, str(s.fileno()), hashlib.sha256(first).hexdigest(), str(pid)])
elif how == 'listed':
    # By the function of the C library that takes the arguments one by one.
    pid = os.fork()
    if pid == 0:
        import ctypes
        text = lambda *all: [ctypes.c_char_p(one.encode()) for one in all]
        args = text(sys.executable, sys.executable, '-c', heir, str(s.fileno()), hashlib.sha256(first).hexdigest(), 'more', 'words')
        ctypes.CDLL(None).execl(*args, ctypes.c_char_p(None))
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    p = None
elif how == 'child':
    # As inetd does: a child executes the program, and this process has closed the connection by then.
    r, w = os.pipe()
    p = os.fork()
    if p == 0:
        client.stdin.close(); client.stdout.close()
        os.read(r, 1)
        os.dup2(s.fileno(), 0)
        os.execv(sys.executable, [sys.executable, '-c', heir, '0', hashlib.sha256(first).hexdigest()])
    s.close()
    os.write(w, b'x')
    assert os.waitpid(p, 0)[1] == 0
    p = None
elif how == 'stdin':
    # Without a fork of this process's own; what is given is standard input.
    p = run(0, stdin=s)
elif how == 'spawn':
    pid = os.posix_spawn(sys.executable, [sys.executable, '-c', heir, '0', hashlib.sha256(first).hexdigest()], os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, s.fileno(), 0)])
    assert os.waitpid(pid, 0)[1] == 0
    p = None
elif how == 'stranger':
    p = run(s.fileno(), pass_fds=[s.fileno()])
elif how == 'plain':
    # A program that does not take part: it has no environment.
    p = run(s.fileno(), pass_fds=[s.fileno()], env={})
elif how == 'message':
    ours, theirs = socket.socketpair()
    p = subprocess.Popen([sys.executable, '-c', 'import socket, sys; s = socket.socket(fileno=int(sys.argv[1])); '
        'fd = socket.recv_fds(s, 1, 1)[1][0]; sys.argv[1] = str(fd); exec(sys.argv[3])', str(theirs.fileno()),
        hashlib.sha256(first).hexdigest(), heir], pass_fds=[theirs.fileno()])
    socket.send_fds(ours, [b'x'], [s.fileno()])
elif how == 'neglected':
    # A program that has it and does nothing with it.
    p = subprocess.Popen([sys.executable, '-c', 'import sys; sys.stdin.read()'], pass_fds=[s.fileno()], stdin=subprocess.PIPE)
    sys.argv[1:] = [str(os.dup(s.fileno())), hashlib.sha256(first).hexdigest()]
    mine = s; exec(heir.replace('s.close()', 'p.stdin.close(); p.wait(); s.close()')); s = mine
if p: assert p.wait() == 0
s.close()
print(client.communicate()[0].decode(), end='')
"#;

/// Sends numbers, reads what comes for them, and ends.
const CLIENT: &str = r#"
import hashlib, os, socket, sys, time
s = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
while s.recv(1) == b'c': s.sendall(bytes(1000))
big = int(sys.argv[2])
data = b''.join(i.to_bytes(4, 'little') for i in range(big // 4))
if sys.argv[3] == 'True':
    # Until TCP has got none of it for a while, if it moves.
    def by_tcp():
        return int.from_bytes(s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 208)[200:208], 'little')
    # Nobody reads, so not more than TCP's window.
    more, sent = 0, 1000
    s.sendall(data[:sent])
    while more < 20 and sent < big:
        before = by_tcp()
        s.sendall(data[sent:sent + 20])
        sent += 20
        time.sleep(0.005)
        more = more + 1 if by_tcp() - before < 10 else 0
    print(sent, flush=True)
else:
    s.sendall(data)
total = hashlib.sha256()
left = 500000
while left:
    got = s.recv(left)
    if not got: break
    total.update(got); left -= len(got)
s.sendall(b'the end')
s.shutdown(socket.SHUT_WR)
print('client', left, total.hexdigest(), s.recv(1))
"#;

/// Reads on where the server stopped.
const HEIR: &str = r#"
import hashlib, os, socket, sys
s = socket.socket(fileno=int(sys.argv[1]))
def read(n):
    total, left = hashlib.sha256(), n
    while left:
        got = s.recv(left)
        if not got: break
        total.update(got); left -= len(got)
    return total.hexdigest(), left
big = BIG
data = b''.join(i.to_bytes(4, 'little') for i in range(big // 4))
hash = lambda data: hashlib.sha256(data).hexdigest()
print('heir', sys.argv[2] == hash(data[:777]), read(big - 777) == (hash(data[777:]), 0))
s.sendall(b''.join(i.to_bytes(4, 'big') for i in range(125000)))
print('heir', read(7), s.recv(1))
s.close()
sys.stdout.flush()
if len(sys.argv) > 3 and sys.argv[3].isdigit(): os.waitpid(int(sys.argv[3]), 0)
"#;

fn run(way: Way<'_>, how: &str, big: usize) -> Ran {
    let moves = if matches!(way, Way::Plain) { "stays" } else { "moves" };
    let heir = HEIR.replace("BIG", &big.to_string());
    let ran = way.run("python3", &["-c", SERVER, how, moves, &big.to_string(), CLIENT, &heir]);
    let mut lines: Vec<_> = ran.out.lines().collect();
    lines.sort_unstable();
    Ran { out: lines.join("\n"), err: ran.err }
}

/// Has a connection handed on while a little is under way, and while more is than fits anywhere.
fn handed_on(how: &str) {
    let daemon = daemon();
    for big in [40_000, 3_000_000] {
        let plain = run(Way::Plain, how, big);
        let moved = run(Way::Dmbridge(&daemon), how, big);
        assert_eq!(moved.out, plain.out, "{how}, {big}:\n{}", moved.err);
        assert!(moved.out.contains("heir") && moved.out.contains("client 0"), "{}", moved.out);
        // Who makes it its standard input says so before it executes something.
        let back = moved.counter("went back to TCP: another program got the connection")
            + moved.counter("went back to TCP: the program did something with it that only TCP can do");
        assert!(back > 0, "{how}, {big}: it was never called back:\n{}", moved.err);
    }
}

#[test]
fn a_program_that_is_executed_goes_on_with_a_moved_connection() {
    handed_on("exec");
}

#[test]
fn what_lies_in_tcp_from_before_a_connection_moved_comes_before_what_is_in_the_ring() {
    let daemon = daemon();
    let plain = run(Way::Plain, "early", 10_000);
    // It does not move meanwhile if the server was just reading when it could have: then there is less to see here.
    let moved = run(Way::Dmbridge(&daemon), "early", 10_000);
    assert_eq!(moved.out, plain.out, "{}", moved.err);
}

#[test]
fn a_program_that_is_executed_by_execl_goes_on_with_a_moved_connection() {
    handed_on("listed");
}

#[test]
fn a_child_executes_a_program_after_its_parent_has_closed_the_moved_connection() {
    handed_on("child");
}

#[test]
fn a_moved_connection_becomes_a_childs_standard_input() {
    handed_on("stdin");
}

#[test]
fn a_moved_connection_is_spawned_into_a_program() {
    handed_on("spawn");
}

#[test]
fn a_program_that_inherited_a_moved_connection_calls_it_back_when_it_uses_it() {
    handed_on("stranger");
}

#[test]
fn a_program_that_does_not_take_part_gets_a_moved_connection() {
    handed_on("plain");
}

#[test]
fn a_program_that_inherited_a_moved_connection_and_does_not_use_it_changes_nothing() {
    let daemon = daemon();
    let plain = run(Way::Plain, "neglected", 3_000_000);
    let moved = run(Way::Dmbridge(&daemon), "neglected", 3_000_000);
    assert_eq!(moved.out, plain.out, "{}", moved.err);
    assert_eq!(moved.counter("went back to TCP: another program got the connection"), 0, "{}", moved.err);
    assert!(moved.moved() > 3_000_000, "{}", moved.err);
}

/// Forks children that send, and kills each while it does; sends something by itself after each.
const KILLER: &str = r#"
import os, signal, socket, subprocess, sys, time
listener = socket.create_server(('127.0.0.1', 0))
client = subprocess.Popen([sys.executable, '-c', sys.argv[2], str(listener.getsockname()[1])], stdout=subprocess.PIPE)
s, _ = listener.accept()
def by_tcp():
    return int.from_bytes(s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)[128:136], 'little')
end = time.monotonic() + 30
while True:
    before = by_tcp()
    for i in range(50):
        s.sendall(b'x')
        s.recv(1)
    if sys.argv[1] == 'stays' or by_tcp() - before < 25: break
    assert time.monotonic() < end, 'it does not move'
for i in range(30):
    child = os.fork()
    if child == 0:
        while True: s.send(b'y' * 60000)
    # The client says when something of it has come.
    client.stdout.readline()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    s.sendall(b'z' * 100000)
s.shutdown(socket.SHUT_WR)
print('ended', client.stdout.readlines()[-1])
"#;

/// Answers until it is sent something else. Says a line for each child that has begun to send.
const COUNTER: &str = r#"
import socket, sys
s = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
last = b'z'
while True:
    got = s.recv(50000)
    if not got: break
    if got == b'x': s.sendall(b'a')
    for byte in (got[:1], got[-1:]):
        if byte == b'y' and last != b'y': print('more', flush=True)
        last = byte
print('all', flush=True)
"#;

#[test]
fn a_process_that_is_killed_while_it_sends_does_not_block_those_that_share_the_connection() {
    let daemon = daemon();
    for (way, moves) in [(Way::Plain, "stays"), (Way::Dmbridge(&daemon), "moves")] {
        let ran = way.run("python3", &["-c", KILLER, moves, COUNTER]);
        assert!(ran.out.starts_with("ended b'all"), "{}{}", ran.out, ran.err);
        assert!(moves == "stays" || ran.moved() > 3_000_000, "{}", ran.err);
    }
}

#[test]
fn a_moved_connection_is_passed_in_a_message() {
    handed_on("message");
}
