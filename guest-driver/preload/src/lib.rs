//! What `dmbridge-run` preloads: TCP connections of an unchanged program move over to DMBs, and everything that the program
//! sees of them stays as it was. How, and what is carried, is in `docs/run.md`.
//!
//! The functions of the C library that touch sockets are defined here again. Each looks the descriptor up and is the
//! real function for whatever is not a TCP connection that proved itself worth the effort.

mod arena;
mod conn;
mod crowd;
mod elf;
mod epoll;
mod errno;
mod handover;
mod header;
mod identity;
mod io;
mod iov;
mod life;
mod lock;
mod meeting;
mod poll;
mod real;
mod service;
mod settings;
mod signal;
mod stats;
mod table;
mod tcp;
mod unseen;
mod version;

/// Says something to who asked for it (`dmbridge-run --verbose`).
macro_rules! verbose {
    ($($words:tt)*) => {
        if $crate::settings::get().verbose {
            eprintln!("dmbridge-run: {}", format_args!($($words)*));
        }
    };
}
use verbose;

/// A number that nobody else has; 0 as long as the kernel has no randomness.
fn random() -> u64 {
    let mut number = 0u64;
    // SAFETY: 8 bytes.
    errno::keep(|| unsafe { libc::getrandom((&raw mut number).cast(), 8, libc::GRND_NONBLOCK) });
    number
}

extern "C" fn start() {
    table::init();
    settings::get();
    stats::get();
    service::set_process();
    handover::inherit();
    // SAFETY: the handlers take no arguments. Without memory for them forks go unnoticed; nothing else is left to try.
    unsafe {
        libc::pthread_atfork(
            Some(life::before_fork),
            Some(life::after_fork_in_parent),
            Some(life::after_fork_in_child),
        );
        libc::atexit(life::at_exit);
    }
}

#[used]
#[unsafe(link_section = ".init_array")]
static START: extern "C" fn() = start;
