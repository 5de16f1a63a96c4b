//! The control API: HTTP/1.1 and JSON on a UNIX socket, for people and their tools (`docs/dmbridged.md`).
//!
//! It only tells; it changes nothing. It has one thread and never touches the data path: each answer is one question to
//! the daemon's control thread.

use axum::extract::Path;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use dmbridge_proto::ids::Gid;
use dmbridged::report::Report;
use dmbridged::socket::Socket;
use serde::Serialize;
use serde_json::json;
use std::os::unix::net::UnixListener;
use std::{io, thread};

/// Serves the API on `socket` until the process ends. `report` asks the daemon; `None`: it is ending.
pub fn start<R>(socket: &Socket, report: R) -> io::Result<()>
where
    R: Fn() -> Option<Report> + Clone + Send + Sync + 'static,
{
    let listener = socket.try_clone()?;
    listener.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    thread::Builder::new().name("control-api".into()).spawn(move || {
        if let Err(error) = runtime.block_on(serve(listener, report)) {
            tracing::error!("the control API ended: {error}");
        }
    })?;
    Ok(())
}

async fn serve<R>(listener: UnixListener, report: R) -> io::Result<()>
where
    R: Fn() -> Option<Report> + Clone + Send + Sync + 'static,
{
    axum::serve(tokio::net::UnixListener::from_std(listener)?, router(report)).await
}

fn router<R>(report: R) -> Router
where
    R: Fn() -> Option<Report> + Clone + Send + Sync + 'static,
{
    let (all, devices, device, engines, health) =
        (report.clone(), report.clone(), report.clone(), report.clone(), report);
    Router::new()
        .route("/v1/report", get(async move || answer(all(), |report| report)))
        .route("/v1/devices", get(async move || answer(devices(), |report| report.devices)))
        .route("/v1/devices/{gid}", get(async move |Path(gid): Path<String>| one_device(device(), &gid)))
        .route("/v1/engines", get(async move || answer(engines(), |report| report.engines)))
        .route("/v1/health", get(async move || answer(health(), |_| json!({ "status": "ok" }))))
        .fallback(async || {
            error(
                StatusCode::NOT_FOUND,
                "no such resource; see /v1/report, /v1/devices, /v1/engines, /v1/health",
            )
        })
        .method_not_allowed_fallback(async || {
            error(StatusCode::METHOD_NOT_ALLOWED, "only GET is possible here")
        })
}

fn one_device(report: Option<Report>, gid: &str) -> Response {
    let Ok(gid) = gid.parse::<Gid>() else {
        return error(
            StatusCode::BAD_REQUEST,
            "a GID is 1 to 16 or exactly 32 hexadecimal digits and not zero",
        );
    };
    let Some(report) = report else { return ending() };
    match report.devices.into_iter().find(|device| device.gid == gid.to_string()) {
        Some(device) => Json(device).into_response(),
        None => error(StatusCode::NOT_FOUND, "no device has this GID; see /v1/devices"),
    }
}

fn answer<T: Serialize>(report: Option<Report>, part: impl FnOnce(Report) -> T) -> Response {
    report.map_or_else(ending, |report| Json(part(report)).into_response())
}

fn ending() -> Response {
    error(StatusCode::SERVICE_UNAVAILABLE, "the daemon is ending")
}

fn error(status: StatusCode, text: &str) -> Response {
    (status, Json(json!({ "error": text }))).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use dmbridged::report::{DeviceReport, EnginesReport, PoolReport, TopologyReport};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn report() -> Report {
        let device =
            DeviceReport { name: "web".into(), gid: "0000000000000042".into(), ..DeviceReport::default() };
        Report {
            version: "1".into(),
            pid: 7,
            fabric_id: 0x0d3b,
            system_eid: String::new(),
            threads: 3,
            pool: PoolReport::default(),
            devices: vec![device],
            topology: TopologyReport::default(),
            extents: Vec::new(),
            engines: EnginesReport::default(),
        }
    }

    #[test]
    fn every_resource_answers_and_every_error_is_json() {
        let folder = tempfile::tempdir().unwrap();
        let socket = Socket::bind(&folder.path().join("s"), 0o600).unwrap();
        start(&socket, || Some(report())).unwrap();
        let get = |request: &str| {
            let mut stream = UnixStream::connect(socket.path()).unwrap();
            write!(stream, "{request} HTTP/1.1\r\nHost: d\r\nConnection: close\r\n\r\n").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            let body: serde_json::Value = serde_json::from_str(body).unwrap();
            (head[9..12].to_string(), body)
        };
        let ok = |path: &str| {
            let (status, body) = get(&format!("GET {path}"));
            assert_eq!(status, "200", "{path}");
            body
        };
        assert_eq!(serde_json::from_value::<Report>(ok("/v1/report")).unwrap(), report());
        assert_eq!(ok("/v1/devices")[0]["name"], "web");
        assert_eq!(ok("/v1/devices/42")["name"], "web");
        assert_eq!(ok("/v1/engines")["rows"], json!([]));
        assert_eq!(ok("/v1/health")["status"], "ok");
        for (request, status) in [
            ("GET /", "404"),
            ("GET /v1/devices/43", "404"),
            ("GET /v1/devices/x", "400"),
            ("POST /v1/report", "405"),
            ("DELETE /v1/devices/42", "405"),
        ] {
            let (got, body) = get(request);
            assert_eq!(got, status, "{request}");
            assert!(body["error"].is_string(), "{request}");
        }
    }
}
