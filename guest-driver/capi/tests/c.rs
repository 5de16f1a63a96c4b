//! The library as a program in C gets it: installed, found by pkg-config, compiled against, and run over the real daemon.

use dmbridge_tests::build::build;
use dmbridge_tests::daemon::TestDaemon;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const HERE: &str = env!("CARGO_MANIFEST_DIR");

/// The header as cbindgen makes it now.
fn header() -> String {
    let config = cbindgen::Config::from_file(Path::new(HERE).join("cbindgen.toml")).expect("cbindgen.toml");
    let mut text = Vec::new();
    cbindgen::Builder::new()
        .with_crate(HERE)
        .with_config(config)
        .generate()
        .expect("cbindgen understands the crate")
        .write(&mut text);
    // What only a Rust program has to promise is said once at the top.
    without_safety(&String::from_utf8(text).expect("a header is a text"))
}

/// Leaves out the sections that say what makes a call safe: C has no unsafe blocks to justify.
fn without_safety(header: &str) -> String {
    let mut lines = Vec::new();
    let mut skip = false;
    for line in header.lines() {
        if line.trim() == "* # Safety" {
            skip = true;
            // The empty line before it.
            lines.pop();
        }
        skip &= line.trim() != "*/";
        if !skip {
            lines.push(line);
        }
    }
    lines.join("\n") + "\n"
}

#[test]
fn the_header_is_current() {
    let path = Path::new(HERE).join("include/dmbridge.h");
    let want = header();
    if std::env::var_os("DMBRIDGE_BLESS").is_some() {
        std::fs::write(&path, &want).expect("the header can be written");
    }
    let is = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        is == want,
        "include/dmbridge.h is not what the code says; renew it by: DMBRIDGE_BLESS=1 cargo test --package dmbridge-capi"
    );
}

#[track_caller]
fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{errors}", output.status);
    output
}

/// Installs the library into a folder.
fn install(to: &Path) {
    let library: PathBuf = build("dmbridge-capi", "libdmbridge.so");
    let folder = library.parent().expect("a folder");
    run(Command::new(Path::new(HERE).join("install")).arg("--prefix").arg(to).arg(folder));
}

#[test]
fn a_program_in_c_exchanges_data_in_every_way() {
    let folder = tempfile::tempdir().expect("a folder");
    let prefix = folder.path().join("usr");
    install(&prefix);
    let daemon = TestDaemon::start();
    let pkg_config = |args: &[&str]| {
        let output = run(Command::new("pkg-config")
            .args(args)
            .arg("dmbridge")
            .env("PKG_CONFIG_PATH", prefix.join("lib/pkgconfig")));
        String::from_utf8(output.stdout)
            .expect("flags")
            .split_whitespace()
            .map(String::from)
            .collect::<Vec<_>>()
    };
    let source = Path::new(HERE).join("examples/exchange.c");
    let warnings = ["-std=c11", "-D_DEFAULT_SOURCE", "-Wall", "-Wextra", "-Werror", "-pthread"];
    let dynamic = pkg_config(&["--cflags", "--libs"]);
    let mut shared = pkg_config(&["--cflags"]);
    shared.push(prefix.join("lib/libdmbridge.a").to_str().expect("a plain name").into());
    // Everything that the static library needs, without the shared one.
    shared.extend(pkg_config(&["--static", "--libs"]).into_iter().filter(|flag| flag != "-ldmbridge"));
    for (name, flags) in [("dynamic", dynamic), ("static", shared)] {
        let program = folder.path().join(name);
        run(Command::new("cc").args(warnings).arg(&source).args(flags).arg("-o").arg(&program));
        let output = run(Command::new(&program).arg(daemon.hub()).env("LD_LIBRARY_PATH", prefix.join("lib")));
        assert_eq!(String::from_utf8_lossy(&output.stdout), "by map\nby move\nby socket\n", "{name}");
    }
    // Without a daemon it says what is wrong.
    let output = Command::new(folder.path().join("static")).arg("/nowhere/hub").output().expect("it runs");
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("cannot connect to /nowhere/hub"), "{errors}");
}

#[test]
fn the_header_is_one_for_cpp_as_well() {
    let folder = tempfile::tempdir().expect("a folder");
    let source = folder.path().join("empty.cpp");
    std::fs::write(&source, "#include <dmbridge.h>\nint main() { return dmbridge_error()[0]; }\n")
        .expect("a file");
    let include = Path::new(HERE).join("include");
    run(Command::new("c++")
        .args(["-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-I"])
        .arg(include)
        .arg(&source));
}
