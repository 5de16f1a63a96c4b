//! What a guest is made of: what `qemu-scripts/provision` found, and the workspace's own programs.

use dmbridge_vm::{Provisioned, scripts};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Programs of this package that are in every guest. Cargo builds them with the package's tests.
const PROGRAMS: [&str; 4] = ["dmbridge-guest-agent", "vm-file", "vm-guest", "vm-sockets"];

/// A script of `qemu-scripts`.
pub fn script(name: &str) -> PathBuf {
    scripts::script(name).unwrap_or_else(|error| panic!("{error}"))
}

/// What `qemu-scripts/provision` found or made.
pub fn found() -> &'static Provisioned {
    static FOUND: OnceLock<Provisioned> = OnceLock::new();
    FOUND.get_or_init(|| Provisioned::find(&[]).unwrap_or_else(|error| panic!("{error}")))
}

/// What `qemu-scripts/provision` says is there (`provision --help` lists it). The first call on a machine may take a
/// minute, and needs a network.
pub fn provisioned(what: &str) -> &'static str {
    found().get(what).unwrap_or_else(|error| panic!("{error}"))
}

/// The guest image with Debian's iperf3, sockperf, redis, nginx and curl in `/opt/debian/bin`. They need 512 MiB of RAM.
pub fn image_with_programs() -> &'static Path {
    static IMAGE: OnceLock<PathBuf> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let found = Provisioned::find(&["--programs"]).unwrap_or_else(|error| panic!("{error}"));
        let programs = found.get("GUEST_PROGRAMS").unwrap_or_else(|error| panic!("{error}"));
        let whole = image().with_extension("programs.cpio");
        super::shared::remove_at_exit(&whole);
        // The kernel unpacks one archive after the other.
        let parts =
            [image(), Path::new(programs)].map(|part| fs::read(part).expect("an archive can be read"));
        fs::write(&whole, parts.concat()).unwrap_or_else(|error| panic!("{}: {error}", whole.display()));
        whole
    })
}

/// Removes images of test programs that have ended: one that was killed leaves its own.
fn remove_images_of_the_dead(folder: &Path) {
    let maker = |name: &str| {
        name.strip_prefix("guest-")?.strip_suffix(".cpio")?.split('.').next()?.parse::<u32>().ok()
    };
    for path in fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()) {
        let maker = path.file_name().and_then(|name| maker(name.to_str()?));
        if maker.is_some_and(|maker| !Path::new(&format!("/proc/{maker}")).exists()) {
            let _ = fs::remove_file(path);
        }
    }
}

/// The guest image, made once per test program.
pub fn image() -> &'static Path {
    static IMAGE: OnceLock<PathBuf> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let test = std::env::current_exe().expect("the test's own path");
        let programs = test.ancestors().nth(2).expect("target/profile/deps/test");
        // Beside what it is made of. Test programs that run at the same time each have their own.
        remove_images_of_the_dead(programs);
        let image = programs.join(format!("guest-{}.cpio", std::process::id()));
        super::shared::remove_at_exit(&image);
        let files = PROGRAMS.map(|name| (programs.join(name), format!("/usr/bin/{name}")));
        let files = files.each_ref().map(|(file, place)| (file.as_path(), place.as_str()));
        found().guest_image(&image, &files).unwrap_or_else(|error| panic!("{error}"));
        image
    })
}
