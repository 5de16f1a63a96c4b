//! What the demo sends: a file, or enough of the files that are on every machine. The same on each call.

use anyhow::{Context, Result, bail, ensure};
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::vec;

/// As much of the machine's files as is sent.
const ENOUGH: u64 = 256 << 20;
/// Where they are, in this order.
const FOLDERS: [&str; 5] = ["/usr/lib", "/usr/share", "/usr/bin", "/usr", "/opt"];

/// Files, one after the other.
pub struct Content {
    files: Vec<PathBuf>,
    bytes: u64,
    from: String,
}

impl Content {
    /// One file.
    pub fn of_file(path: &Path) -> Result<Content> {
        let about = fs::metadata(path).with_context(|| format!("{} cannot be read", path.display()))?;
        ensure!(about.is_file(), "{} is not a regular file; name one", path.display());
        File::open(path).with_context(|| format!("{} cannot be read", path.display()))?;
        Ok(Content { files: vec![path.to_owned()], bytes: about.len(), from: path.display().to_string() })
    }

    /// Programs and libraries of this machine.
    pub fn of_this_machine() -> Result<Content> {
        let (mut files, mut bytes) = (Vec::new(), 0);
        for folder in FOLDERS {
            walk(Path::new(folder), &mut files, &mut bytes);
            if bytes >= ENOUGH {
                let from = format!("{} files of this machine", files.len());
                return Ok(Content { files, bytes, from });
            }
        }
        bail!(
            "this machine has only {} MiB of files that can be read in {}; name a file with --file",
            bytes >> 20,
            FOLDERS.join(", ")
        )
    }

    /// How much it is; what is read can be different if somebody changes the files.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// All of it, from the start.
    pub fn read(self) -> Reader {
        Reader { files: self.files.into_iter(), current: None }
    }
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} from {}", crate::report::bytes(self.bytes), self.from)
    }
}

/// Adds the regular files below a folder, in the order of their names, until it is enough.
fn walk(folder: &Path, files: &mut Vec<PathBuf>, bytes: &mut u64) {
    let mut entries: Vec<_> = fs::read_dir(folder).into_iter().flatten().flatten().collect();
    entries.sort_by_key(|entry| entry.file_name());
    for entry in entries {
        if *bytes >= ENOUGH {
            return;
        }
        // Neither follows a link: no loops, nothing twice.
        let path = entry.path();
        let Ok(about) = entry.metadata() else { continue };
        if about.is_dir() {
            walk(&path, files, bytes);
        } else if about.is_file() && about.len() > 0 && File::open(&path).is_ok() {
            *bytes += about.len();
            files.push(path);
        }
    }
}

/// Reads the files one after the other.
pub struct Reader {
    files: vec::IntoIter<PathBuf>,
    current: Option<File>,
}

impl Read for Reader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(file) = &mut self.current {
                match file.read(into)? {
                    0 => self.current = None,
                    n => return Ok(n),
                }
            }
            match self.files.next() {
                Some(path) => self.current = Some(File::open(path)?),
                None => return Ok(0),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_walked_in_order_without_following_links() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::create_dir(path("b")).unwrap();
        for (name, text) in [("c", "three"), ("a", "one"), ("b/x", "two"), ("empty", "")] {
            fs::write(path(name), text).unwrap();
        }
        std::os::unix::fs::symlink(folder.path(), path("b/loop")).unwrap();
        let (mut files, mut bytes) = (Vec::new(), 0);
        walk(folder.path(), &mut files, &mut bytes);
        assert_eq!(files, [path("a"), path("b/x"), path("c")]);
        let mut text = String::new();
        Content { files, bytes, from: String::new() }.read().read_to_string(&mut text).unwrap();
        assert_eq!((text.as_str(), bytes), ("onetwothree", 11));
    }

    #[test]
    fn what_is_no_file_is_refused_with_its_name() {
        let error = |path: &str| format!("{:#}", Content::of_file(Path::new(path)).err().unwrap());
        assert!(error("/nowhere/at/all").contains("/nowhere/at/all cannot be read"));
        assert!(error("/usr").contains("/usr is not a regular file"));
        assert!(error("/dev/zero").contains("not a regular file"));
    }
}
