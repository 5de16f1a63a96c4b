//! Asks a daemon's control API: HTTP on a UNIX socket.

use anyhow::{Context, Result, bail};
use http_body_util::{BodyExt, Empty};
use hyper::Request;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use std::path::Path;
use tokio::net::UnixStream;

/// What a daemon answers to `GET` of a resource, as JSON.
pub fn get(socket: &Path, resource: &str) -> Result<Vec<u8>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(async {
        let stream = UnixStream::connect(socket).await.with_context(|| {
            format!(
                "nobody answers at {}; is dmbridged running with `--control {}`, and may this user use it",
                socket.display(),
                socket.display()
            )
        })?;
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
