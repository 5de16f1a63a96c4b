//! What `--print-capabilities` prints (QEMU `docs/interop/vhost-user.json`: `VHostUserBackendCapabilities`).

/// The type by which management software knows this back-end. The schema has no ISM; `rpmsg`, messages through shared
/// memory, is the nearest that nobody looks for, so nothing takes this back-end for one that it is not.
pub const TYPE: &str = "rpmsg";

/// One JSON object, in one line.
pub fn json() -> String {
    serde_json::json!({ "type": TYPE }).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_description_file_names_the_same_type() {
        let file: serde_json::Value =
            serde_json::from_str(include_str!("../share/50-dmbridged.json")).unwrap();
        assert_eq!(file["type"], TYPE);
        assert_eq!(json(), r#"{"type":"rpmsg"}"#);
    }
}
