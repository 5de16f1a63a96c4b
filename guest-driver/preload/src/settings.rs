//! What `dmbridge-run` says by the environment. Read when the library is loaded: programs clear their environment.

use std::path::PathBuf;
use std::sync::OnceLock;

/// Where the device is.
pub enum Place {
    /// A daemon's socket.
    Hub(PathBuf),
    /// A character device of the kernel module.
    File(PathBuf),
    /// What the library finds.
    Any,
}

/// The settings.
pub struct Settings {
    pub place: Place,
    /// The network in which addresses name connections.
    pub network: Option<String>,
    /// Say why connections stay TCP.
    pub verbose: bool,
}

/// The settings.
pub fn get() -> &'static Settings {
    static SETTINGS: OnceLock<Settings> = OnceLock::new();
    SETTINGS.get_or_init(|| {
        let path = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        Settings {
            place: match (path("DMBRIDGE_DEVICE"), path("DMBRIDGE_HUB")) {
                (Some(file), _) => Place::File(file),
                (None, Some(socket)) => Place::Hub(socket),
                (None, None) => Place::Any,
            },
            network: std::env::var("DMBRIDGE_NETWORK").ok().filter(|name| !name.is_empty()),
            verbose: std::env::var_os("DMBRIDGE_RUN_VERBOSE").is_some(),
        }
    })
}
