//! The scripts of `qemu-scripts`: where they are, what `provision` finds or makes, and guest images.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Names another folder with the scripts than the one of the checkout that this was built from.
const VARIABLE: &str = "DMBRIDGE_SCRIPTS";

/// A script of `qemu-scripts`.
///
/// # Errors
///
/// If it is not there.
pub fn script(name: &str) -> Result<PathBuf, String> {
    let folder = match std::env::var_os(VARIABLE) {
        Some(folder) => folder.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join(".."),
    };
    let path = folder.join(name);
    if path.is_file() {
        return Ok(path);
    }
    Err(format!(
        "there is no {}; set {VARIABLE} to the folder qemu-scripts of a checkout of dmbridge",
        path.display()
    ))
}

/// What `qemu-scripts/provision` found or made.
#[derive(Debug, Clone)]
pub struct Provisioned(HashMap<String, String>);

impl Provisioned {
    /// Finds, or makes: the first call on a machine may take minutes, and needs a network. The script says on standard
    /// error what it does.
    ///
    /// # Errors
    ///
    /// If the script fails.
    pub fn find(options: &[&str]) -> Result<Provisioned, String> {
        let path = script("provision")?;
        let output = Command::new(&path)
            .args(options)
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .map_err(|error| format!("{}: {error}", path.display()))?;
        if !output.status.success() {
            return Err("qemu-scripts/provision failed; what it printed says why".into());
        }
        let lines = String::from_utf8_lossy(&output.stdout);
        let pairs = lines.lines().filter_map(|line| line.split_once('='));
        Ok(Provisioned(pairs.map(|(key, value)| (key.into(), value.into())).collect()))
    }

    /// One of the things that `provision --help` lists.
    ///
    /// # Errors
    ///
    /// If the script says nothing of it.
    pub fn get(&self, what: &str) -> Result<&str, String> {
        self.0.get(what).map(String::as_str).ok_or_else(|| format!("provision says nothing of {what}"))
    }

    /// Builds the kernel module of `guest-driver/kernel` for the guests' kernel in this folder, if what is there is older
    /// than its source; its file. Whoever builds in the same folder at the same time takes turns.
    ///
    /// # Errors
    ///
    /// If it does not build; with what `make` said.
    pub fn kernel_module(&self, folder: &Path) -> Result<PathBuf, String> {
        let makefile = script("../guest-driver/kernel/Makefile")?;
        let source = makefile.parent().unwrap_or(&makefile);
        let folder = &folder.join(self.get("KERNEL_RELEASE")?);
        std::fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        let output = Command::new("flock")
            .arg(folder.join(".lock"))
            .args(["sh", "-ec"])
            .arg("cp -ru \"$0\"/. .; make --silent KERNEL_HEADERS=\"$1\"; strip --strip-debug dmbridge.ko")
            .args([source, Path::new(self.get("KERNEL_HEADERS")?)])
            .current_dir(folder)
            .output()
            .map_err(|error| format!("flock: {error}"))?;
        if output.status.success() {
            return Ok(folder.join("dmbridge.ko"));
        }
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        Err(format!("the kernel module does not build (make and gcc have to be installed): {said}"))
    }

    /// Makes a guest image of the base image and these files, each with its place in the guest.
    ///
    /// # Errors
    ///
    /// If the script fails.
    pub fn guest_image(&self, output: &Path, files: &[(&Path, &str)]) -> Result<(), String> {
        let mut command = Command::new(script("guest-image")?);
        command.env("INITRAMFS", self.get("INITRAMFS")?).env("BUSYBOX", self.get("BUSYBOX")?).arg(output);
        for (file, place) in files {
            let mut word = file.as_os_str().to_owned();
            word.push("=");
            word.push(place);
            command.arg(word);
        }
        match command.status() {
            Ok(status) if status.success() => Ok(()),
            Ok(_) => Err("qemu-scripts/guest-image failed; what it printed says why".into()),
            Err(error) => Err(format!("qemu-scripts/guest-image: {error}")),
        }
    }
}
