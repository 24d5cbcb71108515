//! As much of an HTTP client as the tests need.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

#[derive(Clone, Copy)]
pub(crate) struct Client(pub(crate) SocketAddr);

/// What a server answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// Names in lower case.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(own, _)| own == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The objects of a stream, which must end as OpenAI's do.
    pub(crate) fn events(&self) -> Vec<Value> {
        assert_eq!(self.header("content-type"), Some("text/event-stream"), "{}", self.body);
        let events: Vec<&str> = self.body.split_terminator("\n\n").collect();
        let (last, events) = events.split_last().expect("an event");
        assert_eq!(*last, "data: [DONE]");
        let parse = |event: &&str| {
            serde_json::from_str(event.strip_prefix("data: ").expect("data")).expect("JSON")
        };
        events.iter().map(parse).collect()
    }

    /// The objects of a response's stream, each of which names its event and its place.
    pub(crate) fn named_events(&self) -> Vec<Value> {
        assert_eq!(self.header("content-type"), Some("text/event-stream"), "{}", self.body);
        let parse = |(at, event): (usize, &str)| {
            let (name, data) = event.split_once('\n').expect("two lines");
            let data = data.strip_prefix("data: ").expect("data");
            let object: Value = serde_json::from_str(data).expect("JSON");
            assert_eq!(name.strip_prefix("event: "), object["type"].as_str());
            assert_eq!(object["sequence_number"], at);
            object
        };
        self.body.split_terminator("\n\n").enumerate().map(parse).collect()
    }
}

impl Client {
    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.0).expect("a connection");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
        stream
    }

    /// Sends a request, with further lines of its head.
    pub(crate) fn send(&self, method: &str, path: &str, lines: &str, body: &[u8]) -> TcpStream {
        let mut stream = self.connect();
        let (host, len) = (self.0, body.len());
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\
             content-length: {len}\r\n{lines}\r\n"
        );
        stream.write_all(head.as_bytes()).expect("written");
        // The server may refuse a body before it is written.
        let _ = stream.write_all(body);
        stream
    }

    pub(crate) fn request(&self, method: &str, path: &str, lines: &str, body: &[u8]) -> Answer {
        read(self.send(method, path, lines, body))
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        self.request("GET", path, "", b"")
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Answer {
        self.request("POST", path, "", body.to_string().as_bytes())
    }

    /// The answer to what must be answered.
    pub(crate) fn ask(&self, path: &str, body: &Value) -> Value {
        let answer = self.post(path, body);
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()
    }

    /// A number of the metrics.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").body;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name}")).parse().expect("a number")
    }

    /// Waits until a number of the metrics is as expected.
    pub(crate) fn wait_for(&self, name: &str, is_fine: impl Fn(f64) -> bool) {
        for _ in 0..3000 {
            if is_fine(self.metric(name)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("{name} is {}", self.metric(name));
    }
}

/// Reads an answer up to its end.
pub(crate) fn read(stream: TcpStream) -> Answer {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).expect("a status");
    let status = line.split(' ').nth(1).and_then(|s| s.parse().ok());
    let status = status.unwrap_or_else(|| panic!("no status: {line:?}"));
    let mut headers = Vec::new();
    loop {
        line.clear();
        reader.read_line(&mut line).expect("a header");
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.push((name.to_lowercase(), value.trim().to_owned()));
    }
    let is_chunked =
        headers.iter().any(|(name, value)| name == "transfer-encoding" && value == "chunked");
    let mut body = Vec::new();
    if is_chunked {
        loop {
            line.clear();
            reader.read_line(&mut line).expect("a length");
            let len = usize::from_str_radix(line.trim_end(), 16).expect("a length");
            let mut chunk = vec![0; len + 2];
            reader.read_exact(&mut chunk).expect("a chunk");
            body.extend(&chunk[..len]);
            if len == 0 {
                break;
            }
        }
    } else {
        // A server that refuses a body closes before it has read it.
        let _ = reader.read_to_end(&mut body);
    }
    Answer { status, headers, body: String::from_utf8(body).expect("UTF-8") }
}
