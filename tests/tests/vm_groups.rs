//! Three virtual machines in two groups: what must not be reachable is not, whatever a guest asks for.

use dmbridge_tests::vm::{Driven, pair};

#[test]
fn a_guest_of_another_group_reaches_nothing() {
    let daemon = pair::daemon(&[("a", "shop"), ("b", "shop"), ("c", "stranger")]);
    let vms = pair::boot(&daemon, ["a", "b", "c"]);
    let [mut a, mut b, mut c] = [&vms[0], &vms[1], &vms[2]].map(Driven::in_guest);

    // The two of a group: everything works.
    assert_eq!(a.ask(&format!("query {}", b.gid()))["there"], true);
    let (dmb, token) = a.register(&b, 1 << 20);
    let sender = b.sender("attach", &token);
    b.ask(&format!("write {sender} 0 for a alone"));
    assert_eq!(a.ask(&format!("read {dmb} 0 11"))["text"], "for a alone");

    // The third: every answer is the one for what does not exist.
    assert_eq!(c.ask(&format!("query {}", a.gid()))["there"], false);
    assert_eq!(a.ask(&format!("query {}", c.gid()))["there"], false);
    let no_such_device = c.refused("register 00000000000000ff 4096");
    let gid = a.gid().to_string();
    assert_eq!(c.refused(&format!("register {gid} 4096")).replace(&gid, "00000000000000ff"), no_such_device);
    let no_such_token = c.refused("attach 4660");
    assert_eq!(c.refused(&format!("attach {token}")).replace(&token, "4660"), no_such_token);
    let refused = c.refused(&format!("tell {gid} 1 2"));
    assert!(
        refused.contains("ENOENT") || refused.contains("NoEntry") || refused.contains("no started device"),
        "{refused}"
    );

    let no_such_token = c.refused("move 4660");
    assert_eq!(c.refused(&format!("move {token}")).replace(&token, "4660"), no_such_token);
    assert_eq!(a.ask(&format!("read {dmb} 0 11"))["text"], "for a alone");

    // Nothing of the others is in its window.
    let report = daemon.report();
    let of =
        |name: &str| report.devices.iter().find(|device| device.name == name).expect("a configured device");
    assert_eq!((of("c").extents, of("c").mapped_bytes), (0, 0));
    assert_eq!((of("a").extents, of("b").extents), (1, 1));
}
