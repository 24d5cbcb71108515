//! Models of the hub, from a server of this test's own.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use serde_json::json;

use crate::common::{model_copy, ok, text, tiny};

const COMMIT: &str = "0123456789012345678901234567890123456789";
const OTHER_COMMIT: &str = "9876543210987654321098765432109876543210";

/// What the hub has of a model at a revision.
struct Repo {
    name: &'static str,
    revision: &'static str,
    commit: &'static str,
    folder: PathBuf,
}

/// A hub of these models; the first answer with weights in safetensors breaks off.
struct Hub {
    endpoint: String,
    /// Path and range of every request.
    requests: Arc<Mutex<Vec<(String, u64)>>>,
    home: tempfile::TempDir,
}

impl Hub {
    fn start(repos: Vec<Repo>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests: Arc<Mutex<Vec<(String, u64)>>> = Arc::default();
        let log = Arc::clone(&requests);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                // A client that has what it wants may leave.
                let _ = serve(stream.unwrap(), &repos, &log);
            }
        });
        Self { endpoint, requests, home: tempfile::tempdir().unwrap() }
    }

    fn of(name: &'static str, folder: &Path) -> Self {
        let folder = folder.to_path_buf();
        Self::start(vec![Repo { name, revision: "main", commit: COMMIT, folder }])
    }

    fn moa(&self, offline: bool, model: &str) -> Output {
        let args = ["generate", "--model", model, "--prompt", "Hello", "--max-new-tokens", "4"];
        let mut command = Command::new(env!("CARGO_BIN_EXE_moa"));
        command.args(args).env("HF_HOME", self.home.path()).env("HF_ENDPOINT", &self.endpoint);
        command.env_remove("HF_HUB_CACHE").env_remove("HF_HUB_OFFLINE");
        command.env("NO_PROXY", "127.0.0.1");
        if offline {
            command.env("HF_HUB_OFFLINE", "1");
        }
        command.output().unwrap()
    }

    /// What a run that must succeed says.
    #[track_caller]
    fn says(&self, offline: bool, model: &str) -> Vec<u8> {
        let output = self.moa(offline, model);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{model}: {stderr}");
        output.stdout
    }

    /// Runs what must be refused with these parts in the message.
    #[track_caller]
    fn refuses(&self, offline: bool, model: &str, parts: &[&str]) {
        let output = self.moa(offline, model);
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{model}: {message}");
        for part in parts {
            assert!(message.contains(part), "{model}: no `{part}` in {message}");
        }
    }

    fn requests(&self) -> Vec<(String, u64)> {
        std::mem::take(&mut *self.requests.lock().unwrap())
    }
}

/// Names of all files below a folder.
fn files(folder: &Path, before: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    let names = entries.flat_map(|entry| {
        let name = format!("{before}{}", entry.file_name().to_str().unwrap());
        match entry.path().is_dir() {
            true => files(&entry.path(), &format!("{name}/")),
            false => vec![name],
        }
    });
    names.collect()
}

fn serve(
    mut stream: TcpStream,
    repos: &[Repo],
    log: &Mutex<Vec<(String, u64)>>,
) -> std::io::Result<()> {
    let (mut path, mut first, mut last) = (String::new(), 0, None);
    for line in BufReader::new(stream.try_clone()?).lines() {
        let line = line?;
        if let Some(rest) = line.strip_prefix("GET ") {
            path = rest.split(' ').next().unwrap().to_string();
        }
        let line = line.to_lowercase();
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
    let info =
        |repo: &&Repo| path == format!("/api/models/{}/revision/{}", repo.name, repo.revision);
    if let Some(repo) = repos.iter().find(info) {
        let names = files(&repo.folder, "").into_iter().map(|name| json!({"rfilename": name}));
        let body = json!({"sha": repo.commit, "siblings": names.collect::<Vec<_>>()}).to_string();
        return write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
             Connection: close\r\n\r\n{body}",
            body.len()
        );
    }
    let file = repos.iter().find_map(|repo| {
        let file = path.strip_prefix(&format!("/{}/resolve/{}/", repo.name, repo.commit))?;
        Some((repo.commit, fs::read(repo.folder.join(file)).ok()?))
    });
    let Some((commit, bytes)) = file else {
        return write!(
            stream,
            "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
    };
    let (len, first) = (bytes.len(), first as usize);
    let end = last.map_or(len, |last| (last + 1).min(len));
    write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\nETag: \"{}\"\r\nX-Repo-Commit: {commit}\r\n\
         Content-Range: bytes {first}-{}/{len}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        path.replace('/', "_"),
        end - 1,
        end - first,
    )?;
    let end = if breaks_off { len / 2 } else { end };
    stream.write_all(&bytes[first..end])
}

#[test]
fn a_model_of_the_hub_is_downloaded_once_and_its_download_goes_on_where_it_broke_off() {
    let hub = Hub::of("owner/name", &tiny());
    let local = hub.says(true, text(&tiny()));

    hub.refuses(true, "owner/name", &["owner/name", "HF_HUB_OFFLINE"]);
    assert!(hub.requests().is_empty());

    assert_eq!(hub.says(false, "owner/name"), local);
    let requests = hub.requests();
    let resumed =
        |(path, first): &(String, u64)| path.ends_with("/model.safetensors?") && *first > 0;
    assert!(requests.iter().any(resumed), "{requests:?}");

    for (offline, model) in [(false, "owner/name"), (true, "owner/name@main")] {
        assert_eq!(hub.says(offline, model), local);
    }
    assert_eq!(hub.says(true, &format!("owner/name@{COMMIT}")), local);
    assert!(hub.requests().is_empty(), "the cache has everything");

    hub.refuses(false, "owner/other", &["owner/other", "404"]);
}

#[test]
fn what_a_folder_can_do_without_is_not_demanded_of_the_hub() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_copy(dir.path(), "model");
    fs::remove_file(model.join("tokenizer.json")).unwrap();
    let hub = Hub::of("owner/none", &model);
    hub.refuses(false, "owner/none", &["tokenizer.json", "tokenizer.model"]);
    assert_eq!(hub.requests().len(), 1, "the list of files says so");

    let pieces = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../moa-models/tests/fixtures/sentencepiece/bpe.model"
    );
    fs::copy(pieces, model.join("tokenizer.model")).unwrap();
    fs::write(model.join("quantize_config.json"), "{}").unwrap();
    let hub = Hub::of("owner/pieces", &model);
    let local = hub.says(true, text(&model));
    assert_eq!(hub.says(false, "owner/pieces"), local);
    let requests = hub.requests();
    for name in ["/tokenizer.model?", "/quantize_config.json?"] {
        assert!(requests.iter().any(|(path, _)| path.ends_with(name)), "{name}: {requests:?}");
    }
    assert_eq!(hub.says(true, "owner/pieces"), local);
}

/// Two files that are one model: all of a file, and an empty one.
fn split(whole: &[u8]) -> [Vec<u8>; 2] {
    let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let number =
        |key: &str, n: u16| [&text(key)[..], &2u32.to_le_bytes(), &n.to_le_bytes()].concat();
    let keys = |part| [number("split.no", part), number("split.count", 2)].concat();
    // Offsets stay aligned by what fills up.
    let rest = [&text("x")[..], &8u32.to_le_bytes(), &text(&"x".repeat(28))].concat();
    let first = [keys(0), rest].concat();
    assert!(first.len().is_multiple_of(32));
    let count = u64::from_le_bytes(whole[16..24].try_into().unwrap()) + 3;
    let first = [&whole[..16], &count.to_le_bytes(), &first, &whole[24..]].concat();
    let second = [&whole[..8], &0u64.to_le_bytes(), &2u64.to_le_bytes(), &keys(1)].concat();
    [first, second]
}

#[test]
fn a_gguf_file_of_the_hub_is_the_only_one_or_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = ["one", "two"].map(|name| dir.path().join(name));
    let (q8, q4) = (one.join("m-Q8_0.gguf"), one.join("m-Q4_0.gguf"));
    fs::create_dir(&one).unwrap();
    fs::create_dir_all(two.join("parts")).unwrap();
    let tiny = tiny();
    for (kind, path) in [("q8_0", &q8), ("q4_0", &q4)] {
        let out = text(path);
        ok(dir.path(), &["quantize", "--model", text(&tiny), "--type", kind, "--out", out]);
    }
    // Files beside that say nothing of GGUF.
    fs::write(one.join("README.md"), "").unwrap();
    fs::write(one.join("config.json"), "{}").unwrap();
    for (number, bytes) in split(&fs::read(&q8).unwrap()).iter().enumerate() {
        let name = format!("parts/m-{:05}-of-00002.gguf", number + 1);
        fs::write(two.join(name), bytes).unwrap();
    }
    fs::write(two.join("mmproj-F16.gguf"), "").unwrap();
    let repo = |revision, commit, folder| Repo { name: "owner/name", revision, commit, folder };
    let hub = Hub::start(vec![repo("main", COMMIT, one), repo("v2", OTHER_COMMIT, two)]);
    let local = [&q8, &q4].map(|path| hub.says(true, text(path)));

    let both = ["owner/name", "m-Q4_0.gguf, m-Q8_0.gguf"];
    hub.refuses(false, "owner/name", &both);
    hub.refuses(false, "owner/name:q5_0", &both);
    hub.refuses(false, "owner/name/m.gguf", &both);
    hub.refuses(true, "owner/name/m-Q8_0.gguf", &["owner/name/m-Q8_0.gguf", "HF_HUB_OFFLINE"]);

    assert_eq!(hub.says(false, "owner/name/m-Q8_0.gguf"), local[0]);
    let requests = hub.requests();
    let other = |(path, _): &(String, u64)| path.ends_with(".md") || path.contains("Q4_0");
    assert!(!requests.iter().any(other), "{requests:?}");
    for (offline, model) in
        [(false, "owner/name/m-Q8_0.gguf"), (true, "owner/name:q8_0@main"), (true, "owner/name")]
    {
        assert_eq!(hub.says(offline, model), local[0], "{model}");
    }
    assert!(hub.requests().is_empty(), "the cache has the file");
    assert_eq!(hub.says(false, "owner/name:Q4_0"), local[1]);
    hub.refuses(true, "owner/name", &both);

    // The only model of another revision, in two files.
    assert_eq!(hub.says(false, "owner/name@v2"), local[0]);
    for model in ["owner/name@v2", "owner/name/parts/m-00002-of-00002.gguf@v2"] {
        assert_eq!(hub.says(true, model), local[0], "{model}");
    }
}
