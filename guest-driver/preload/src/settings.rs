//! What `dmbridge-run` says by the environment. Read when the library is loaded: programs clear their environment.

use std::sync::OnceLock;

/// The settings.
pub struct Settings {
    /// The daemon's hub socket.
    pub hub: String,
    /// Say why connections stay TCP.
    pub verbose: bool,
}

/// The settings.
pub fn get() -> &'static Settings {
    static SETTINGS: OnceLock<Settings> = OnceLock::new();
    SETTINGS.get_or_init(|| Settings {
        hub: std::env::var("DMBRIDGE_HUB").unwrap_or_else(|_| "/run/dmbridge/hub.sock".into()),
        verbose: std::env::var_os("DMBRIDGE_RUN_VERBOSE").is_some(),
    })
}
