//! Programs of Debian, as they are, with and without `dmbridge-run`: the same results, and with it the bytes go through
//! DMBs.

use dmbridge_tests::daemon::TestDaemon;
use dmbridge_tests::deadline::until;
use dmbridge_tests::preload::{Ran, Way, answers, daemon, find, free_port};
use serde_json::Value;
use std::path::Path;

/// Has a test done both ways; then what went through DMBs has to be at least `bytes`.
fn both<T: PartialEq + std::fmt::Debug>(
    daemon: &TestDaemon,
    bytes: u64,
    run: impl Fn(Way<'_>) -> (T, Vec<Ran>),
) {
    let (plain, _) = run(Way::Plain);
    let (result, ran) = run(Way::Dmbridge(daemon));
    assert_eq!(result, plain);
    let moved: u64 = ran.iter().map(Ran::moved).sum();
    let said: String = ran.iter().map(|ran| ran.err.as_str()).collect();
    assert!(moved >= bytes, "{moved} of {bytes} bytes went through DMBs:\n{said}");
}

#[test]
fn iperf3() {
    let daemon = daemon();
    for args in [&[][..], &["-P", "4"], &["-R"], &["--bidir"], &["-6"]] {
        both(&daemon, 10 << 20, |way| {
            let port = free_port();
            let text = port.to_string();
            let mut server = way.serve("iperf3", &["-s", "-1", "-p", &text], port);
            let address = if args == ["-6"] { "::1" } else { "127.0.0.1" };
            // For a second: the connection moves in the midst of it, however busy the machine is.
            let mut all = vec!["-c", address, "-p", &text, "-t", "1", "--json"];
            all.extend(args.iter().filter(|arg| **arg != "-6"));
            let client = way.run("iperf3", &all);
            let json: Value = serde_json::from_str(&client.out).expect("JSON");
            let sent = ["sum_sent", "sum_sent_bidir_reverse"].map(|sum| json["end"][sum]["bytes"].as_u64());
            let enough = sent.into_iter().flatten().any(|sent| sent >= 10 << 20);
            ((enough, json["error"].is_null()), vec![client, server.finish()])
        });
    }
}

#[test]
fn the_daemon_shows_what_connections_do() {
    let daemon = daemon();
    let way = Way::Dmbridge(&daemon);
    let port = free_port();
    let text = port.to_string();
    let server = way.serve("iperf3", &["-s", "-1", "-p", &text], port);
    let client = std::thread::scope(|scope| {
        let client = scope.spawn(|| way.run("iperf3", &["-c", "127.0.0.1", "-p", &text, "-t", "2"]));
        until("two devices, with DMBs and signals", || {
            let report = serde_json::to_value(daemon.report()).expect("JSON");
            let report = report["devices"].as_array().expect("devices").clone();
            let with = |name: &str| report.iter().filter(|device| device.to_string().contains(name)).count();
            (report.len() >= 2 && with("dmbs") >= 2).then_some(())
        });
        client.join().expect("iperf3 ends well")
    });
    assert!(client.moved() > 1 << 20);
    drop(server);
    until("nothing stays of it", || daemon.report().devices.is_empty().then_some(()));
}

#[test]
fn sockperf() {
    let daemon = daemon();
    both(&daemon, 10_000, |way| {
        let port = free_port();
        let text = port.to_string();
        let server = way.serve("sockperf", &["server", "--tcp", "-i", "127.0.0.1", "-p", &text], port);
        // It ends at more than 600,000 round trips a second unless it is told to expect them.
        let args = ["ping-pong", "--tcp", "-i", "127.0.0.1", "-p", &text, "-t", "1", "--data-integrity"];
        let args = [&args[..], &["--mps", "20000000"]].concat();
        let client = way.run("sockperf", &args);
        let good = client.out.contains("Summary: Latency") && !client.out.contains("ERROR");
        (good, vec![client, server.stop()])
    });
}

#[test]
fn redis() {
    let daemon = daemon();
    both(&daemon, 200_000, |way| {
        let port = free_port();
        let text = port.to_string();
        let folder = tempfile::tempdir().expect("a folder");
        let here = folder.path().to_str().expect("a plain name");
        let args = ["--port", &text, "--save", "", "--appendonly", "no", "--dir", here];
        let server = way.serve("redis-server", &args, port);
        let cli = |args: &[&str]| way.run("redis-cli", &[&["-p", &text], args].concat()).out;
        let mut results = vec![cli(&["set", "key", "value"]), cli(&["get", "key"])];
        let mut ran = Vec::new();
        for more in [&["-c", "1"][..], &["-c", "30"], &["-P", "16"], &["-d", "20000"], &["-t", "lrange_100"]]
        {
            let args = [&["-p", &text, "-n", "2000", "-t", "set,get", "--csv"], more].concat();
            let bench = way.run("redis-benchmark", &args);
            results.push(bench.out.lines().filter_map(|line| line.split(',').next()).collect());
            ran.push(bench);
        }
        results.push(cli(&["dbsize"]));
        ran.push(server.stop());
        (results, ran)
    });
}

/// A folder that everybody may read, with a small and a large file.
fn site() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).expect("permissions");
    std::fs::write(folder.path().join("small"), "x".repeat(600)).expect("a file");
    let large: Vec<u8> = (0..30_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    std::fs::write(folder.path().join("large"), large).expect("a file");
    folder
}

#[test]
fn nginx_wrk_and_curl() {
    let daemon = daemon();
    let site = site();
    let here = site.path().to_str().expect("a plain name");
    let key = site.path().join("key.pem");
    let certificate = site.path().join("certificate.pem");
    let (key, certificate) = (key.to_str().expect("plain"), certificate.to_str().expect("plain"));
    let new = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"];
    Way::Plain.run("openssl", &[&new[..], &["-keyout", key, "-out", certificate]].concat());
    both(&daemon, 60 << 20, |way| {
        let (port, tls) = (free_port(), free_port());
        let configuration = format!(
            "daemon off; user root; worker_processes 2; pid {here}/pid; error_log {here}/errors;
             events {{ worker_connections 500; }}
             http {{ access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000;
             server {{ listen 127.0.0.1:{port}; root {here}; }}
             server {{ listen 127.0.0.1:{tls} ssl; ssl_certificate {certificate}; ssl_certificate_key {key};
             root {here}; }} }}"
        );
        let file = format!("{here}/nginx.conf");
        std::fs::write(&file, configuration).expect("a file");
        let server = way.serve("nginx", &["-c", &file], port);
        let mut ran = Vec::new();
        let mut results = Vec::new();
        for url in [format!("http://127.0.0.1:{port}"), format!("https://127.0.0.1:{tls}")] {
            let got = format!("{here}/got");
            // Three times over one connection, so that it moves in the middle of a file.
            let large = format!("{url}/large");
            let args =
                ["-sSk", "--limit-rate", "200M", "-o", &got, &large, "-o", &got, &large, "-o", &got, &large];
            ran.push(way.run("curl", &args));
            results.push(same(Path::new(&got), &site.path().join("large")));
            let small = format!("{url}/small");
            let wrk = way.run("wrk", &["-t", "2", "-c", "20", "-d", "1", &small]);
            results.push(!wrk.out.contains("Socket errors") && !wrk.out.contains("Non-2xx"));
            ran.push(wrk);
            // A connection for each request.
            let wrk = way.run("wrk", &["-t", "1", "-c", "4", "-d", "1", "-H", "Connection: close", &small]);
            results.push(!wrk.out.contains("Non-2xx"));
        }
        ran.push(server.stop());
        (results, ran)
    });
}

fn same(a: &Path, b: &Path) -> bool {
    std::fs::read(a).expect("a file") == std::fs::read(b).expect("a file")
}

#[test]
fn memcached() {
    let daemon = daemon();
    both(&daemon, 10_000, |way| {
        let port = free_port();
        let text = port.to_string();
        let server = way.serve("memcached", &["-u", "root", "-l", "127.0.0.1", "-p", &text, "-t", "2"], port);
        let script = format!(
            "import socket, hashlib\n\
             s = socket.create_connection(('127.0.0.1', {port})); f = s.makefile('rwb')\n\
             total = hashlib.sha256()\n\
             for i in range(3000):\n\
             \x20   v = bytes((i * j) % 256 for j in range(1 + i * 13 % 3000))\n\
             \x20   f.write(b'set k%d 0 0 %d\\r\\n%s\\r\\n' % (i % 50, len(v), v)); f.flush(); total.update(f.readline())\n\
             \x20   f.write(b'get k%d\\r\\n' % (i % 50)); f.flush()\n\
             \x20   n = int(f.readline().split()[3]); total.update(f.read(n + 2)); total.update(f.readline())\n\
             print(total.hexdigest())\n"
        );
        let client = way.run("python3", &["-c", &script]);
        (client.out.clone(), vec![client, server.stop()])
    });
}

#[test]
fn python() {
    let daemon = daemon();
    let site = site();
    let here = site.path().to_str().expect("a plain name");
    both(&daemon, 10 << 20, |way| {
        let port = free_port();
        let text = port.to_string();
        let server = way.serve("python3", &["-m", "http.server", &text, "-b", "127.0.0.1", "-d", here], port);
        let script = format!(
            "import asyncio, hashlib, urllib.request\n\
             print(hashlib.sha256(urllib.request.urlopen('http://127.0.0.1:{port}/large').read()).hexdigest())\n\
             async def get():\n\
             \x20   r, w = await asyncio.open_connection('127.0.0.1', {port})\n\
             \x20   w.write(b'GET /large HTTP/1.0\\r\\n\\r\\n'); await w.drain()\n\
             \x20   data = await r.read(); w.close()\n\
             \x20   return hashlib.sha256(data.split(b'\\r\\n\\r\\n', 1)[1]).hexdigest()\n\
             async def main(): print(await asyncio.gather(get(), get(), get()))\n\
             asyncio.run(main())\n"
        );
        let client = way.run("python3", &["-c", &script]);
        (client.out.clone(), vec![client, server.stop()])
    });
}

#[test]
fn node() {
    let daemon = daemon();
    // Says what hash a body has, and as many bytes as it is asked for.
    let server = "const http = require('http'), crypto = require('crypto');
        http.createServer((question, answer) => {
            const hash = crypto.createHash('sha256');
            question.on('data', data => hash.update(data));
            question.on('end', () => {
                answer.setHeader('hash', hash.digest('hex'));
                answer.end(Buffer.alloc(Number(question.url.slice(1)), 'dmbridge'));
            });
        }).listen(Number(process.argv[1]), '127.0.0.1');
        process.on('SIGTERM', () => process.exit(0));";
    let client = "const http = require('http'), crypto = require('crypto');
        const agent = new http.Agent({ keepAlive: true, maxSockets: 4 });
        const total = crypto.createHash('sha256');
        const ask = (send, want) => new Promise((done, fail) => {
            const options = { port: Number(process.argv[1]), host: '127.0.0.1', agent, path: '/' + want, method: 'POST' };
            http.request(options, answer => {
                const hash = crypto.createHash('sha256').update(answer.headers.hash);
                answer.on('data', data => hash.update(data));
                answer.on('end', () => done(hash.digest('hex')));
            }).on('error', fail).end(Buffer.alloc(send, 'some bytes'));
        });
        (async () => {
            for (let i = 0; i < 60; i++) {
                const sizes = [[i, 100], [100 * i, 3], [5, 70000 + i], [20000, 20000]];
                for (const hash of await Promise.all(sizes.map(([send, want]) => ask(send, want)))) total.update(hash);
            }
            total.update(await ask(20 << 20, 30 << 20));
            console.log(total.digest('hex'));
            agent.destroy();
        })();";
    both(&daemon, 20 << 20, |way| {
        let port = free_port();
        let text = port.to_string();
        let server = way.serve("node", &["-e", server, &text], port);
        let client = way.run("node", &["-e", client, &text]);
        (client.out.clone(), vec![client, server.stop()])
    });
}

#[test]
fn openssh_executes_itself_for_each_connection() {
    let daemon = daemon();
    let site = site();
    let here = site.path().to_str().expect("a plain name");
    let key = format!("{here}/key");
    Way::Plain.run("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-f", &key]);
    std::fs::create_dir_all("/run/sshd").expect("the folder in which sshd locks its children up");
    // It wants its whole path, because it executes itself.
    let sshd = find("sshd");
    let large = format!("{here}/large");
    both(&daemon, 4 << 20, |way| {
        let port = free_port();
        let configuration = format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {key}\nAuthorizedKeysFile {key}.pub\nPidFile none\n\
             StrictModes no\nUsePAM no\nPermitRootLogin yes\nSubsystem sftp internal-sftp\n"
        );
        let file = format!("{here}/sshd_config");
        std::fs::write(&file, configuration).expect("a file");
        let server = way.serve(sshd.to_str().expect("a plain name"), &["-D", "-e", "-f", &file], port);
        let copy = |from: &str, to: &str| {
            let options = ["-q", "-i", &key, "-P", &port.to_string(), "-o", "StrictHostKeyChecking=no"];
            let options = [&options[..], &["-o", "UserKnownHostsFile=/dev/null", from, to]].concat();
            way.run("scp", &options)
        };
        let (there, back) = (format!("{here}/there"), format!("{here}/back"));
        let ran = vec![
            copy(&large, &format!("root@127.0.0.1:{there}")),
            copy(&format!("root@127.0.0.1:{there}"), &back),
            server.stop(),
        ];
        let same = same(Path::new(&large), Path::new(&back));
        let removed = [there, back].map(|file| std::fs::remove_file(file).is_ok());
        ((same, removed), ran)
    });
}

#[test]
fn postgresql_forks_for_each_connection() {
    let daemon = daemon();
    let Some(folder) = std::fs::read_dir("/usr/lib/postgresql").ok().and_then(|mut all| all.next()) else {
        panic!(
            "postgresql is missing; `cargo xtask test` installs what the tests need, on Debian and as root"
        );
    };
    let folder = folder.expect("a folder").path().join("bin");
    let program = |name: &str| folder.join(name).to_str().expect("a plain name").to_string();
    both(&daemon, 20_000, |way| {
        let data = tempfile::tempdir().expect("a folder");
        let here = data.path().join("data");
        let here = here.to_str().expect("a plain name");
        // It refuses to be root.
        let user = ["--reuid", "postgres", "--regid", "postgres", "--clear-groups"];
        Way::Plain.run("chown", &["postgres", data.path().to_str().expect("plain")]);
        let initdb = program("initdb");
        let init: &[&str] = &[&initdb, "-D", here, "-A", "trust", "-U", "postgres", "--no-sync"];
        Way::Plain.run("setpriv", &[&user[..], init].concat());
        let port = free_port();
        let text = port.to_string();
        let postgres = program("postgres");
        let serve: &[&str] =
            &[&postgres, "-D", here, "-p", &text, "-c", "unix_socket_directories=", "-c", "fsync=off"];
        let server = way.serve("setpriv", &[&user[..], serve].concat(), port);
        until("PostgreSQL accepts connections", || answers(port).then_some(()));
        let pgbench = program("pgbench");
        let at = ["-h", "127.0.0.1", "-p", &text, "-U", "postgres"];
        until("PostgreSQL is ready", || {
            let ready = Way::Plain.command(&program("pg_isready"), &at).output().expect("pg_isready");
            ready.status.success().then_some(())
        });
        let mut ran = vec![way.run(&pgbench, &[&at[..], &["-i", "-q", "postgres"]].concat())];
        let bench = way.run(&pgbench, &[&at[..], &["-c", "4", "-t", "2000", "-S", "postgres"]].concat());
        let count = |bench: &Ran| {
            let line =
                bench.out.lines().find(|line| line.starts_with("number of transactions actually processed"));
            line.map(str::to_string)
        };
        let result = count(&bench);
        ran.push(bench);
        let ended = server.stop();
        ran.push(ended);
        (result, ran)
    });
}
