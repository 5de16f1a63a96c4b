//! The agent of guests that tests boot.

fn main() {
    eprintln!("dmbridge-guest-agent: {}", dmbridge_vm::guest_agent::serve());
    std::process::exit(1);
}
