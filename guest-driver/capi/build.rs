//! Gives the shared library its name for the dynamic linker.

fn main() {
    let major = std::env::var("CARGO_PKG_VERSION_MAJOR").unwrap_or_default();
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libdmbridge.so.{major}");
}
