//! Asks a daemon's control API: HTTP on a UNIX socket.

use anyhow::{Context, Result, anyhow, bail};
use http_body_util::{BodyExt, Empty};
use hyper::Request;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;

use crate::out;

/// Where a daemon that was told nothing else by its package listens.
pub const SOCKET: &str = "/run/dmbridge/control.sock";

/// How long an answer may take, which takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// Which daemon is asked, and how its answer is shown.
#[derive(clap::Args)]
pub struct Args {
    /// The daemon's control socket
    #[arg(long, value_name = "SOCKET", default_value = SOCKET)]
    control: PathBuf,
    /// Print the daemon's answer as JSON
    #[arg(long)]
    json: bool,
}

impl Args {
    /// Shows a resource: all of the answer as JSON, or what `text` makes of the part that is taken from it.
    pub fn show<T: DeserializeOwned>(&self, resource: &str, text: impl FnOnce(&T) -> String) -> Result<()> {
        let (all, part) = ask(&self.control, resource)?;
        if self.json { out::json(&all) } else { out::text(text(&part)) }
    }
}

/// What a daemon answers, and the part of it that is taken.
pub fn ask<T: DeserializeOwned>(socket: &Path, resource: &str) -> Result<(Value, T)> {
    let answer = get(socket, resource)?;
    let not_ours = || format!("{} is not a dmbridged's control socket", socket.display());
    let value: Value = serde_json::from_slice(&answer).with_context(not_ours)?;
    let part = T::deserialize(&value).with_context(not_ours)?;
    Ok((value, part))
}

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
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let answer = runtime.block_on(async { tokio::time::timeout(PATIENCE, get_now(socket, resource)).await });
    answer.unwrap_or_else(|_| {
        bail!("{} has not answered for {} s; is it dmbridged's?", socket.display(), PATIENCE.as_secs())
    })
}

async fn get_now(socket: &Path, resource: &str) -> Result<Vec<u8>> {
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
}
