//! Asks a daemon's control API: HTTP on a UNIX socket.

use anyhow::{Context, Result, anyhow, bail};
use http_body_util::{BodyExt, Empty};
use hyper::Request;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use tokio::net::UnixStream;

/// Why nobody can be asked there, and what to do.
fn explain(socket: &Path, error: &io::Error) -> anyhow::Error {
    let name = socket.display();
    let start = format!("start dmbridged with `--control {name}`, or name its control socket with --control");
    match error.kind() {
        io::ErrorKind::NotFound => anyhow!("there is no socket {name}; {start}"),
        io::ErrorKind::PermissionDenied => {
            anyhow!(
                "this user may not use {name}; ask as root, or get into the group that the socket belongs to"
            )
        }
        io::ErrorKind::ConnectionRefused => {
            let is_socket = std::fs::metadata(socket).is_ok_and(|about| about.file_type().is_socket());
            match is_socket {
                true => anyhow!("nobody listens at {name} any more; {start}"),
                false => anyhow!("{name} is not a socket; name the daemon's control socket with --control"),
            }
        }
        _ => anyhow!("{name} cannot be used: {error}; {start}"),
    }
}

/// What a daemon answers to `GET` of a resource, as JSON.
pub fn get(socket: &Path, resource: &str) -> Result<Vec<u8>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(async {
        let stream = UnixStream::connect(socket).await.map_err(|error| explain(socket, &error))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let request = Request::get(resource).header("host", "dmbridged").body(Empty::<Bytes>::new())?;
        let ask = async move {
            let answer = sender.send_request(request).await?;
            let status = answer.status();
            Ok::<_, hyper::Error>((status, answer.into_body().collect().await?.to_bytes()))
        };
        // The connection has to be driven while the question is asked, and ends when nobody can ask any more.
        let (answer, _) = tokio::join!(ask, async {
            let _ = connection.await;
        });
        let (status, body) =
            answer.with_context(|| format!("{} is not a dmbridged's control socket", socket.display()))?;
        if !status.is_success() {
            bail!("dmbridged answered {status}: {}", String::from_utf8_lossy(&body));
        }
        Ok(body.to_vec())
    })
}
