//! Models of the hub, from a server of this test's own.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use serde_json::json;

use crate::common::tiny;

const COMMIT: &str = "0123456789012345678901234567890123456789";

/// The small model as `owner/name`; the first answer with its weights breaks off.
struct Hub {
    endpoint: String,
    /// Path and range of every request.
    requests: Arc<Mutex<Vec<(String, u64)>>>,
}

impl Hub {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests: Arc<Mutex<Vec<(String, u64)>>> = Arc::default();
        let log = Arc::clone(&requests);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                // A client that has what it wants may leave.
                let _ = serve(stream.unwrap(), &log);
            }
        });
        Self { endpoint, requests }
    }
}

fn serve(mut stream: TcpStream, log: &Mutex<Vec<(String, u64)>>) -> std::io::Result<()> {
    let (mut path, mut first, mut last) = (String::new(), 0, None);
    for line in BufReader::new(stream.try_clone()?).lines() {
        let line = line?.to_lowercase();
        if let Some(rest) = line.strip_prefix("get ") {
            path = rest.split(' ').next().unwrap().to_string();
        }
        if let Some((from, to)) = line.strip_prefix("range: bytes=").and_then(|r| r.split_once('-'))
        {
            (first, last) = (from.parse().unwrap(), to.parse::<usize>().ok());
        }
        if line.is_empty() {
            break;
        }
    }
    let breaks_off = path.ends_with("model.safetensors") && last.is_none() && {
        let log = log.lock().unwrap();
        !log.iter().any(|(path, first)| path.ends_with("/model.safetensors?") && *first == 0)
    };
    let name = if last.is_none() { format!("{path}?") } else { path.clone() };
    log.lock().unwrap().push((name, first));
    if path == "/api/models/owner/name/revision/main" {
        let files =
            fs::read_dir(tiny())?.map(|e| json!({"rfilename": e.unwrap().file_name().to_str()}));
        let body = json!({"sha": COMMIT, "siblings": files.collect::<Vec<_>>()}).to_string();
        return write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
             Connection: close\r\n\r\n{body}",
            body.len()
        );
    }
    let file = path.strip_prefix(&format!("/owner/name/resolve/{COMMIT}/"));
    let Some(bytes) = file.and_then(|file| fs::read(tiny().join(file)).ok()) else {
        return write!(
            stream,
            "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
    };
    let (len, first) = (bytes.len(), first as usize);
    let end = last.map_or(len, |last| (last + 1).min(len));
    write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\nETag: \"{}\"\r\nX-Repo-Commit: {COMMIT}\r\n\
         Content-Range: bytes {first}-{}/{len}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        path.replace('/', "_"),
        end - 1,
        end - first,
    )?;
    let end = if breaks_off { len / 2 } else { end };
    stream.write_all(&bytes[first..end])
}

fn moa(hub: &Hub, home: &Path, offline: bool, model: &str) -> Output {
    let args = ["generate", "--model", model, "--prompt", "Hello", "--max-new-tokens", "4"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_moa"));
    command.args(args).env("HF_HOME", home).env("HF_ENDPOINT", &hub.endpoint);
    command.env_remove("HF_HUB_CACHE").env_remove("HF_HUB_OFFLINE").env("NO_PROXY", "127.0.0.1");
    if offline {
        command.env("HF_HUB_OFFLINE", "1");
    }
    command.output().unwrap()
}

#[test]
fn a_model_of_the_hub_is_downloaded_once_and_its_download_goes_on_where_it_broke_off() {
    let home = tempfile::tempdir().unwrap();
    let hub = Hub::start();
    let local = moa(&hub, home.path(), true, tiny().to_str().unwrap());

    let offline = moa(&hub, home.path(), true, "owner/name");
    let message = String::from_utf8_lossy(&offline.stderr).to_string();
    assert_eq!(offline.status.code(), Some(2), "{message}");
    assert!(message.contains("owner/name") && message.contains("HF_HUB_OFFLINE"), "{message}");
    assert!(hub.requests.lock().unwrap().is_empty());

    let online = moa(&hub, home.path(), false, "owner/name");
    assert!(online.status.success(), "{}", String::from_utf8_lossy(&online.stderr));
    assert_eq!(online.stdout, local.stdout);
    let requests = std::mem::take(&mut *hub.requests.lock().unwrap());
    let resumed =
        |(path, first): &(String, u64)| path.ends_with("/model.safetensors?") && *first > 0;
    assert!(requests.iter().any(resumed), "{requests:?}");

    for (offline, model) in [(false, "owner/name"), (true, "owner/name@main")] {
        let again = moa(&hub, home.path(), offline, model);
        assert_eq!(again.stdout, local.stdout, "{}", String::from_utf8_lossy(&again.stderr));
    }
    let by_commit = moa(&hub, home.path(), true, &format!("owner/name@{COMMIT}"));
    assert!(by_commit.status.success(), "{}", String::from_utf8_lossy(&by_commit.stderr));
    assert!(hub.requests.lock().unwrap().is_empty(), "the cache has everything");

    let none = moa(&hub, home.path(), false, "owner/other");
    let message = String::from_utf8_lossy(&none.stderr).to_string();
    assert_eq!(none.status.code(), Some(2), "{message}");
    assert!(message.contains("owner/other") && message.contains("404"), "{message}");
}
