//! How a program's file is loaded: whether with this library, without it, or by a loader that cannot load it and gives up.

use std::ffi::OsStr;
use std::io::{ErrorKind, Read};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Scripts for scripts for programs, at most so deep.
const DEPTH: u32 = 4;
/// `PT_INTERP` (elf(5)): where the loader's name is.
const INTERPRETER: usize = 3;

/// How a program is loaded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Loaded {
    /// Dynamically, by glibc's loader.
    With,
    /// Statically; or it gives rights, and so ignores what is preloaded.
    Without,
    /// By the loader of another C library (musl's ends with an error if it cannot load what is preloaded), or of another
    /// machine (glibc's says so on standard error).
    Foreign,
}

/// How a program's file is loaded, if it is there.
pub fn loaded(path: &Path) -> Loaded {
    loaded_to(path, DEPTH)
}

fn loaded_to(path: &Path, depth: u32) -> Loaded {
    let mut file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::PermissionDenied => return Loaded::Without,
        // It is looked for in another folder next.
        Err(_) => return Loaded::With,
    };
    let mut head = [0u8; 4096];
    let (Ok(status), Ok(len)) = (file.metadata(), file.read(&mut head)) else { return Loaded::Without };
    let head = &head[..len];
    if let Some(line) = head.strip_prefix(b"#!") {
        let line = line.split(|byte| *byte == b'\n').next().unwrap_or(line);
        let word = line.split(|byte| byte.is_ascii_whitespace()).find(|word| !word.is_empty());
        return match word {
            Some(word) if depth > 0 => loaded_to(Path::new(OsStr::from_bytes(word)), depth - 1),
            _ => Loaded::Without,
        };
    }
    if head.starts_with(b"\x7fELF\x01") {
        return Loaded::Foreign;
    }
    let Some(loader) = loader(head) else { return Loaded::Without };
    if !loader.contains("/ld-linux") {
        return Loaded::Foreign;
    }
    // SAFETY: a name, and no room for its value.
    let rights = unsafe {
        libc::fgetxattr(file.as_raw_fd(), c"security.capability".as_ptr(), std::ptr::null_mut(), 0)
    };
    if status.mode() & 0o6000 == 0 && rights <= 0 { Loaded::With } else { Loaded::Without }
}

/// The loader that a file of 64 bits names; what lies too far behind to be seen is taken for glibc's.
fn loader(head: &[u8]) -> Option<&str> {
    let number = |at: usize, len: usize| {
        head.get(at..at.saturating_add(len))
            .map_or(0, |bytes| bytes.iter().rev().fold(0usize, |n, b| n << 8 | usize::from(*b)))
    };
    let (start, size, count) = (number(32, 8), number(54, 2), number(56, 2));
    let found = (0..count).map(|i| start.saturating_add(i * size)).find(|at| number(*at, 4) == INTERPRETER);
    let at = found.filter(|_| head.starts_with(b"\x7fELF\x02"))?;
    let name = head.get(number(at + 8, 8)..).unwrap_or_default();
    let name = name.split(|byte| *byte == 0).next().and_then(|name| std::str::from_utf8(name).ok());
    Some(name.filter(|name| !name.is_empty()).unwrap_or("/ld-linux"))
}

/// Where a program is, as `execvp` finds it.
pub fn find(name: &OsStr) -> Option<PathBuf> {
    if name.as_bytes().contains(&b'/') {
        return Some(name.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/bin:/usr/bin".into());
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|at| at.is_file())
}
