//! The results as one page that needs nothing else: pictures are in it, scripts are not.

mod bars;
mod curves;
mod draw;

use anyhow::Result;
use std::fmt::Write;

use super::table::{self, verdicts};
use super::{Measured, Run};
use crate::bench::plan::Case;
use curves::{Chart, Curve, Tick};

/// What a case is called, and what is measured in it.
const CASES: [(Case, &str, &str); 17] = [
    (
        Case::Latency14,
        "Latency, both polling",
        "14 bytes one way: half of a round trip, both sides look all the time. Less is better.",
    ),
    (
        Case::Latency14Sleep,
        "Latency, receiver asleep",
        "14 bytes one way: half of a round trip, asked after 200 µs of silence, in which the receiver has fallen asleep and has to be \
         woken. The asking side waits as it does by default. Less is better.",
    ),
    (
        Case::Latency14BothSleep,
        "Latency, both asleep",
        "14 bytes one way: half of a round trip, both sides made to sleep whenever they wait. Less is better.",
    ),
    (
        Case::Rate100,
        "Requests",
        "100 bytes there, 100 bytes back, one at a time, in each transport's normal form. More is better.",
    ),
    (
        Case::Stream64k,
        "Stream",
        "Writes of 64 KiB; the receiver ends with the bytes in its own buffer. More is better.",
    ),
    (
        Case::Produce64k,
        "Stream that is made and read",
        "The sender generates every byte, the receiver reads every byte: what copies cost beside work. More is better.",
    ),
    (
        Case::Move1m,
        "Transfers of 1 MiB",
        "Several under way, into memory of the receiver (sockets and pipes: to where it has read them). More is better.",
    ),
    (Case::Move64, "Transfers of 64 bytes", "As before, small. More is better."),
    (Case::Move64k, "Transfers of 64 KiB", "As before. More is better."),
    (
        Case::Move16m,
        "Transfers of 16 MiB",
        "As before, and longer than what is copied at once. More is better.",
    ),
    (
        Case::CmaLarge1m,
        "Messages of 1 MiB",
        "There and back, one at a time, from the sender's own buffers into the receiver's own: by two copies through shared memory, or directly by one, of which \
         both processes do a share. More is better.",
    ),
    (Case::CmaLarge16m, "Messages of 16 MiB", "As before. More is better."),
    (
        Case::Iperf3,
        "iperf3",
        "The program as it is, one stream, over TCP and by dmbridge-run. More is better.",
    ),
    (Case::SockperfPp, "sockperf ping-pong", "As it is, 14 bytes one way. Less is better."),
    (Case::SockperfTp, "sockperf throughput", "As it is, messages of 1 KiB per second. More is better."),
    (Case::RedisGet, "redis", "As it is, GET over 50 connections, requests per second. More is better."),
    (
        Case::NginxWrk,
        "nginx and wrk",
        "As they are, 600 bytes over 16 connections, requests per second. More is better.",
    ),
];

/// The page.
pub fn page(run: &Run) -> Result<String> {
    let mut out = String::new();
    let machine = &run.machine;
    let between = match &machine.guests {
        Some(_) => "virtual machine to another: by dmbridge, and by what stock QEMU has instead",
        None => {
            "process to another: by dmbridge, by what a process could use instead, and by the machine itself at its limit"
        }
    };
    write!(
        out,
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<title>dmbridge bench</title>\n\
         <style>\n{}</style>\n<main>\n<h1>dmbridge bench</h1>\n\
         <p class=\"faint\">What it costs to send bytes from one {between}. {}, {} on {}{}.</p>\n",
        include_str!("page.css"),
        escape(machine.date.split('T').next().unwrap_or_default()),
        escape(&machine.cpu),
        escape(&machine.kernel),
        machine
            .virtualised
            .as_ref()
            .map_or(String::new(), |v| format!(", in a virtual machine ({})", escape(v))),
    )?;
    if machine.virtualised.as_deref() == Some("TCG") {
        out.push_str(
            "<p class=\"warning\">This machine is emulated (TCG). What takes how long here says nothing about real \
             ones, and ratios are not those of real ones either.</p>\n",
        );
    }
    if let Some(guests) = &machine.guests {
        writeln!(out, "<p>{}.</p>", escape(&guests.to_string()))?;
        if guests.is_emulated() {
            out.push_str(
                "<p class=\"warning\">The virtual machines are emulated (TCG). What takes how long in them says nothing \
                 about KVM, and ratios are not those of KVM either.</p>\n",
            );
        }
        for sentence in &guests.not_measured {
            writeln!(out, "<p class=\"note\">Not measured: {}.</p>", escape(sentence))?;
        }
    }
    promises(run, &mut out)?;
    cases(run, &mut out)?;
    sweep(run, &mut out)?;
    distributions(run, &mut out)?;
    scale(run, &mut out)?;
    method(run, &mut out)?;
    figures(run, &mut out)?;
    out.push_str("</main>\n</html>\n");
    Ok(out)
}

fn promises(run: &Run, out: &mut String) -> Result<()> {
    let verdicts = verdicts(run);
    if verdicts.is_empty() {
        return Ok(());
    }
    out.push_str(
        "<h2>What is promised</h2>\n<p class=\"note\">Each figure as a multiple of another one of the same run, \
         because machines are noisy and ratios less so.</p>\n<div class=\"card\"><table>\n<tr><th>what<th>ratio \
         of<th class=\"number\">is<th class=\"number\">must<th class=\"number\">aim<th>\n",
    );
    for v in verdicts {
        let word = if v.reached { "reached" } else { "missed" };
        writeln!(
            out,
            "<tr><td>{}<td>{}<td class=\"number\"><b>{}</b><td class=\"number\">{}<td class=\"number\">{}<td \
             class=\"{word}\">{word}",
            v.what,
            v.of,
            table::figure(v.ratio),
            v.must,
            v.aim
        )?;
    }
    out.push_str("</table></div>\n");
    Ok(())
}

fn cases(run: &Run, out: &mut String) -> Result<()> {
    let of = |case: &str| run.results.iter().filter(|r| r.case == case).collect::<Vec<_>>();
    if CASES.iter().all(|(case, ..)| of(&case.name()).is_empty()) {
        return Ok(());
    }
    out.push_str(
        "<h2>Case by case</h2>\n<p class=\"note\">Bars are medians of the rounds, thin lines go from the least to the \
         greatest. Outlined bars are limits of the machine, not something to use.</p>\n<div class=\"cards\">\n",
    );
    for (case, title, about) in CASES {
        let results = of(&case.name());
        if !results.is_empty() {
            let svg = bars::svg(&results)?;
            writeln!(
                out,
                "<section class=\"card\"><h3>{title}</h3>\n<p class=\"note\">{about}</p>\n{svg}</section>"
            )?;
        }
    }
    out.push_str("</div>\n");
    Ok(())
}

/// The curves of one kind of the sweep.
fn sweep_curves(run: &Run, kind: &str) -> Vec<Curve> {
    let mut curves: Vec<Curve> = Vec::new();
    for result in &run.results {
        let Some(bytes) = result.case.strip_prefix(kind).and_then(|bytes| bytes.parse::<f64>().ok()) else {
            continue;
        };
        let point = (bytes, result.value());
        match curves.iter_mut().find(|c| c.transport == result.transport) {
            Some(curve) => curve.points.push(point),
            None => curves.push(Curve { transport: result.transport, points: vec![point] }),
        }
    }
    curves
}

fn sweep(run: &Run, out: &mut String) -> Result<()> {
    let sizes = || {
        crate::bench::plan::sweep_sizes()
            .map(|b| Tick { at: b as f64, label: draw::size(b as f64) })
            .collect()
    };
    let charts = [
        (
            "sweep-latency-",
            "Latency by size",
            "One way, both sides polling; the receiver has the bytes in its own buffer. Lower is better.",
            draw::time as fn(f64) -> String,
        ),
        (
            "sweep-stream-",
            "Throughput by size",
            "Messages one way as fast as they go; the receiver has the bytes in its own buffer. Higher is better.",
            |value| draw::figure(value, "GB/s"),
        ),
    ];
    for (kind, title, about, y_label) in charts {
        let curves = sweep_curves(run, kind);
        if curves.is_empty() {
            continue;
        }
        let svg = Chart { x: sizes(), x_title: "size of a message", y_label, curves }.svg()?;
        writeln!(
            out,
            "<h2>{title}</h2>\n<p class=\"note\">{about} Both axes are logarithmic.</p>\n\
             <div class=\"card wide\">{svg}</div>"
        )?;
    }
    Ok(())
}

fn distributions(run: &Run, out: &mut String) -> Result<()> {
    // From the fraction of messages that are slower, 1 to 1 in 10,000: each nine takes the same room.
    const NINES: [(f64, &str); 6] = [
        (1.0, "all"),
        (2.0, "50 %"),
        (10.0, "90 %"),
        (100.0, "99 %"),
        (1000.0, "99.9 %"),
        (10000.0, "99.99 %"),
    ];
    let charts = [
        (Case::Latency14, "How latency is distributed, both polling"),
        (Case::Latency14Sleep, "How latency is distributed, receiver asleep"),
    ];
    for (case, title) in charts {
        let curve = |r: &Measured| {
            let samples = r.samples.as_ref()?;
            let point = |n: u32| {
                let one_in = 10f64.powf(f64::from(n) / 25.0);
                Some((one_in, samples.quantile(1.0 - 1.0 / one_in)? as f64 / 2.0))
            };
            let points: Vec<_> = (0..=100).filter_map(point).collect();
            (!points.is_empty()).then_some(Curve { transport: r.transport, points })
        };
        let curves: Vec<_> = run.results.iter().filter(|r| r.case == case.name()).filter_map(curve).collect();
        if curves.is_empty() {
            continue;
        }
        let x = NINES.map(|(at, label)| Tick { at, label: label.to_owned() }).into();
        let x_title = "this part of the messages is faster";
        let svg = Chart { x, x_title, y_label: draw::time, curves }.svg()?;
        writeln!(
            out,
            "<h2>{title}</h2>\n<p class=\"note\">14 bytes one way. A flat line is a latency that one can rely on; where \
             it rises, something else ran on the CPU. Lower is better.</p>\n<div class=\"card wide\">{svg}</div>"
        )?;
    }
    Ok(())
}

fn scale(run: &Run, out: &mut String) -> Result<()> {
    let Some(table) = run.scale() else { return Ok(()) };
    out.push_str(
        "<h2>More and more devices</h2>\n<p class=\"note\">One daemon. What does not grow along a row does not depend \
         on the number of devices.</p>\n<div class=\"card\"><table>\n<tr><th>devices",
    );
    for count in &table.devices {
        write!(out, "<th class=\"number\">{count}")?;
    }
    out.push_str("<th>\n");
    for (what, cells) in &table.rows {
        write!(out, "<tr><td>{}", what.replace('-', " "))?;
        for cell in cells {
            let text = cell.map_or_else(String::new, |r| table::figure(r.value()));
            write!(out, "<td class=\"number\">{text}")?;
        }
        writeln!(out, "<td>{}", cells.iter().flatten().next().map_or("", |r| r.unit))?;
    }
    out.push_str("</table></div>\n");
    Ok(())
}

fn method(run: &Run, out: &mut String) -> Result<()> {
    let machine = &run.machine;
    let rounds = run.results.iter().map(|r| r.rounds.len()).max().unwrap_or(0);
    let [a, b] = machine.cpus_used;
    let where_they_are = match &machine.guests {
        Some(_) => "one in each virtual machine, whose threads the system places".to_owned(),
        None => format!("one on CPU {a}, one on CPU {b}"),
    };
    write!(
        out,
        "<h2>How it was measured</h2>\n<p>Two processes, {where_they_are}. In each of {rounds} rounds, all \
         transports of a case take their turn, so that what disturbs the machine disturbs all of them. Latencies are \
         means over many round trips without a clock in between, halved; their distribution is from separate round \
         trips, each timed by the processor's counter. Streams are timed by their receiver, transfers by their \
         sender.</p>\n"
    )?;
    match &machine.guests {
        Some(_) => out.push_str(
            "<p><b>dmbridge-map</b> and <b>dmbridge-move</b> drive the PCI device from user space in the guest, \
             <b>chardev</b> by the kernel module's character device. \
             <b>af-smc</b> are the guest kernel's own AF_SMC sockets, over another device, which the kernel module drives. \
             <b>tcp</b> goes over virtio-net through QEMU's own back-end, from one QEMU to the other, without vhost; \
             <b>vsock</b> through vhost-device-vsock, a process of the host, as ours goes through dmbridged.</p>\n<dl>\n",
        ),
        None => out.push_str(
            "<p>Limits: <b>cacheline</b> is one cache line handed from core to core; <b>ring</b> a bare ring \
             between two cores, copy in and copy out, no protocol, in the shape that was fastest in this run; \
             <b>memcpy</b> one core that copies the same bytes.</p>\n<dl>\n",
        ),
    }
    let mut entry = |name: &str, text: String| writeln!(out, "<dt>{name}<dd>{}", escape(&text));
    entry("date", machine.date.clone())?;
    entry(
        "processor",
        format!("{}, {} CPUs, {} NUMA node(s)", machine.cpu, machine.cpus, machine.numa_nodes),
    )?;
    let caches = machine.caches.iter().filter(|c| c.kind != "Instruction");
    let caches: Vec<_> = caches
        .map(|c| format!("L{} {} (CPUs {})", c.level, draw::size(c.bytes as f64), c.shared_by))
        .collect();
    entry("caches", caches.join(", "))?;
    entry("memory", format!("{:.0} GiB", machine.memory_bytes as f64 / f64::from(1 << 30)))?;
    entry("system", machine.kernel.clone())?;
    entry("frequency governor", machine.governor.clone().unwrap_or_else(|| "not visible".to_owned()))?;
    entry("hypervisor of this machine", machine.virtualised.clone().unwrap_or_else(|| "none".to_owned()))?;
    if let Some(ring) = machine.ring {
        entry(
            "ring at its best",
            format!(
                "{}, shown every {}, copied by {:?}",
                draw::size(ring.bytes as f64),
                draw::size(ring.step as f64),
                ring.copy
            ),
        )?;
    }
    let versions: Vec<_> =
        machine.versions.iter().map(|(name, version)| format!("{name} {version}")).collect();
    entry("versions", versions.join(", "))?;
    out.push_str("</dl>\n");
    Ok(())
}

fn figures(run: &Run, out: &mut String) -> Result<()> {
    out.push_str(
        "<details><summary>All figures</summary>\n<table>\n<tr><th>case<th>transport<th class=\"number\">median<th \
         class=\"number\">min<th class=\"number\">max<th class=\"number\">p50<th class=\"number\">p99<th>unit\n",
    );
    let optional = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), table::figure);
    for r in &run.results {
        let transport = if r.case.starts_with("scale-") { String::new() } else { r.transport.name() };
        write!(out, "<tr><td>{}<td>{transport}", r.case)?;
        let numbers = [table::figure(r.value()), table::figure(r.min()), table::figure(r.max())];
        for number in numbers.into_iter().chain([optional(r.p50), optional(r.p99)]) {
            write!(out, "<td class=\"number\">{number}")?;
        }
        writeln!(out, "<td>{}", r.unit)?;
    }
    out.push_str("</table></details>\n");
    Ok(())
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
