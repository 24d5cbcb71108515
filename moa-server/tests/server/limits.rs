//! Too much, too slow, too late, and nobody there any more.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use moa_server::{Error, Server, ServerOptions};
use serde_json::{Value, json};

use crate::client::read;
use crate::{Running, checkpoint, narrow};

fn options() -> ServerOptions {
    ServerOptions::default()
}

/// A request that goes on for as long as it may.
fn endless(max_tokens: usize) -> Value {
    json!({
        "prompt": "The history of navigation", "max_tokens": max_tokens, "stream": true,
        "ignore_eos": true,
    })
}

#[test]
fn a_client_that_leaves_ends_its_request() {
    let server = Running::new(options());
    let client = server.client;
    for stream in [true, false] {
        let mut body = endless(6000);
        body["stream"] = stream.into();
        let mut socket = client.send("POST", "/v1/completions", "", body.to_string().as_bytes());
        if stream {
            socket.read_exact(&mut [0; 200]).unwrap();
        }
        client.wait_for("moa_requests_running", |running| running == 1.0);
        assert!(client.metric("moa_kv_bytes") < client.metric("moa_kv_bytes_dense"));
        drop(socket);
        client.wait_for("moa_requests_running", |running| running == 0.0);
    }
    assert_eq!(client.metric("moa_requests_cancelled_total"), 2.0);
    assert_eq!(client.metric("moa_kv_bytes"), 0.0);
}

// A client whose connection found no room tries again after a second.
#[test]
#[cfg(target_os = "linux")]
fn connections_that_come_at_once_find_room() {
    let mut options = options();
    options.address.set_port(0);
    // Bound but not run: it takes none of them.
    let server = Server::bind(checkpoint(), narrow(), options).unwrap();
    let connect = |_| TcpStream::connect_timeout(&server.address(), Duration::from_millis(800));
    let connected: Vec<_> = (0..300).map(connect).collect::<Result<_, _>>().unwrap();
    assert_eq!(connected.len(), 300);
}

#[test]
fn a_full_queue_refuses_and_a_long_request_times_out() {
    let server = Running::new(ServerOptions { max_batch: 1, max_queue: 1, ..options() });
    let client = server.client;
    let body = endless(6000).to_string();
    let running = client.send("POST", "/v1/completions", "", body.as_bytes());
    client.wait_for("moa_requests_running", |running| running == 1.0);
    let waiting = client.send("POST", "/v1/completions", "", body.as_bytes());
    client.wait_for("moa_requests_queued", |queued| queued == 1.0);
    let refused = client.post("/v1/completions", &endless(2));
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")));
    drop((running, waiting));
    client.wait_for("moa_requests_queued", |queued| queued == 0.0);
    let mut late = endless(6000);
    late["timeout"] = 0.05.into();
    late["stream"] = false.into();
    let answer = client.post("/v1/completions", &late);
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (504, &json!("timeout")));
}

#[test]
fn requests_wait_for_memory_and_what_never_fits_is_refused() {
    // Room for one request of 128 tokens, not for two.
    let server = Running::new(ServerOptions { kv_memory: 400 << 10, ..options() });
    let client = server.client;
    let body = endless(60).to_string();
    let sockets: Vec<_> =
        (0..4).map(|_| client.send("POST", "/v1/completions", "", body.as_bytes())).collect();
    let answers: Vec<_> = sockets.into_iter().map(|socket| read(socket).events()).collect();
    let texts: Vec<String> = answers
        .iter()
        .map(|chunks| chunks.iter().filter_map(|c| c["choices"][0]["text"].as_str()).collect())
        .collect();
    assert!(texts.iter().all(|text| *text == texts[0]));
    let mut never = endless(60);
    never["n"] = 16.into();
    let answer = client.post("/v1/completions", &never);
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (400, &json!("kv_memory")));
}

#[test]
fn as_many_requests_run_at_once_as_the_server_says() {
    let mut bound = ServerOptions { kv_memory: 8 << 20, ..options() };
    bound.address.set_port(0);
    let server = Server::bind(checkpoint(), narrow(), bound.clone()).expect("a free port");
    let (fitting, dense) = server.fitting(600).unwrap();
    assert!(0 < dense && dense < fitting && fitting < 64, "{dense} {fitting}");
    drop(server);
    let server = Running::new(bound);
    let client = server.client;
    let tokens = client.ask("/tokenize", &json!({ "prompt": endless(1)["prompt"] }));
    let length = tokens["tokens"].as_array().unwrap().len();
    let body = endless(600 - length).to_string();
    let send = |_| client.send("POST", "/v1/completions", "", body.as_bytes());
    let sockets: Vec<_> = (0..fitting + 2).map(send).collect();
    client.wait_for("moa_requests_running", |running| running == fitting as f64);
    client.wait_for("moa_requests_queued", |queued| queued == 2.0);
    drop(sockets);
}

#[test]
fn a_request_of_lower_priority_number_goes_first() {
    let server = Running::new(ServerOptions { max_batch: 1, ..options() });
    let client = server.client;
    let send = |tokens: usize, priority: i64| {
        let mut body = endless(tokens);
        body["priority"] = priority.into();
        client.send("POST", "/v1/completions", "", body.to_string().as_bytes())
    };
    let running = send(200, 0);
    client.wait_for("moa_requests_running", |running| running == 1.0);
    let later = send(6000, 0);
    client.wait_for("moa_requests_queued", |queued| queued == 1.0);
    let first = send(1, -1);
    assert_eq!(read(first).status, 200);
    // The one that came before it has not ended.
    assert_eq!(client.metric("moa_requests_completed_total"), 2.0);
    drop((running, later));
}

#[test]
fn options_that_cannot_work_are_refused_at_the_start() {
    let key = |key: &str| ServerOptions { api_keys: vec![key.into()], ..options() };
    let origin = |origin: &str| ServerOptions { cors_origins: vec![origin.into()], ..options() };
    let bind = |mut options: ServerOptions| {
        options.address.set_port(0);
        Server::bind(checkpoint(), narrow(), options)
    };
    for (refused, option, expected) in [
        (ServerOptions { max_context: Some(8193), ..options() }, "max_context", "8192"),
        (
            ServerOptions { default_max_tokens: Some(8193), ..options() },
            "default_max_tokens",
            "8192",
        ),
        (
            ServerOptions { max_context: Some(96), default_max_tokens: Some(97), ..options() },
            "default_max_tokens",
            "96",
        ),
        (ServerOptions { kv_memory: 1024, ..options() }, "kv_memory", "shortest request"),
        (ServerOptions { model_name: Some(String::new()), ..options() }, "model_name", "one"),
        (key(""), "api_keys", "visible ASCII"),
        (key("secret\n"), "api_keys", "visible ASCII"),
        (key("geheimnis-ß"), "api_keys", "visible ASCII"),
        (origin("foo"), "cors_origins", "https://example.com"),
        (origin("https://Friend.example"), "cors_origins", "https://example.com"),
        (origin("https://friend.example/"), "cors_origins", "https://example.com"),
    ] {
        match bind(refused) {
            Err(Error::Option { what, expected: told, .. }) => {
                assert_eq!(what, option);
                assert!(told.contains(expected), "{what}: {told}");
            }
            other => panic!("{option}: {other:?}"),
        }
    }
    for right in ["*", "null", "http://localhost:3000", "https://[::1]:8443", "app://obsidian.md"] {
        bind(origin(right)).unwrap();
    }
    bind(key("two words")).unwrap();
    bind(ServerOptions { max_context: Some(8192), default_max_tokens: Some(8192), ..options() })
        .unwrap();
}

#[test]
fn keys_and_origins_are_checked() {
    let server = Running::new(ServerOptions {
        api_keys: vec!["secret".into(), "other".into()],
        cors_origins: vec!["https://friend.example".into()],
        ..options()
    });
    let client = server.client;
    let body = json!({ "prompt": "Hi", "max_tokens": 1 }).to_string();
    let post = |lines: &str| client.request("POST", "/v1/completions", lines, body.as_bytes());
    for lines in [
        "",
        "authorization: Bearer wrong\r\n",
        "authorization: secret\r\n",
        "authorization: Basic secret\r\n",
    ] {
        let answer = post(lines);
        assert_eq!(
            (answer.status, &answer.json()["error"]["code"]),
            (401, &json!("invalid_api_key"))
        );
    }
    assert_eq!(client.get("/metrics").status, 401);
    assert_eq!(client.get("/health").status, 200);
    let key = "authorization: Bearer other\r\n";
    assert_eq!(post(key).status, 200);
    for scheme in ["bearer", "BEARER"] {
        assert_eq!(post(&format!("authorization: {scheme} other\r\n")).status, 200);
    }
    let stranger = post(&format!("{key}origin: https://stranger.example\r\n"));
    assert_eq!((stranger.status, stranger.header("access-control-allow-origin")), (403, None));
    let friend = post(&format!("{key}origin: https://friend.example\r\n"));
    let allowed = friend.header("access-control-allow-origin");
    assert_eq!((friend.status, allowed), (200, Some("https://friend.example")));
    let own = post(&format!("{key}origin: http://{}\r\n", client.0));
    assert_eq!(own.status, 200);
    let lines = "origin: https://friend.example\r\naccess-control-request-method: POST\r\n";
    let preflight = client.request("OPTIONS", "/v1/completions", lines, b"");
    assert_eq!(preflight.status, 204);
    assert!(preflight.header("access-control-allow-headers").unwrap().contains("authorization"));
}

#[test]
fn large_and_slow_bodies_are_refused() {
    let client_timeout = Duration::from_millis(200);
    let server = Running::new(ServerOptions { max_body: 1000, client_timeout, ..options() });
    let client = server.client;
    let answer = client.post("/v1/completions", &json!({ "prompt": "x".repeat(2000) }));
    assert_eq!(answer.status, 413, "{}", answer.body);
    // One that does not say how large it is.
    let mut socket = client.connect();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\
        connection: close\r\n\r\n";
    socket.write_all(head.as_bytes()).unwrap();
    for _ in 0..20 {
        if socket.write_all(format!("64\r\n{}\r\n", "x".repeat(100)).as_bytes()).is_err() {
            break;
        }
    }
    assert_eq!(read(socket).status, 413);
    let mut slow = client.connect();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\
        connection: close\r\n\r\n{";
    slow.write_all(head.as_bytes()).unwrap();
    assert_eq!(read(slow).status, 408);
    // A head that never ends: the connection is closed.
    let mut slow = client.connect();
    slow.write_all(b"GET / HTTP/1.1\r\nx-").unwrap();
    let mut rest = Vec::new();
    let _ = slow.read_to_end(&mut rest);
    assert!(!String::from_utf8_lossy(&rest).contains("200 OK"));
}

#[test]
fn idle_connections_make_room_for_requests() {
    let server = Running::new(ServerOptions { max_connections: 8, ..options() });
    let client = server.client;
    let idle: Vec<_> = (0..100).map(|_| client.connect()).collect();
    let answer = client.ask("/v1/completions", &json!({ "prompt": "Hi", "max_tokens": 2 }));
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert!(client.metric("moa_connections") <= 9.0);
    drop(idle);
}

#[test]
fn a_server_that_stops_ends_what_it_has_begun() {
    let mut server = Running::new(options());
    let client = server.client;
    let body = endless(40).to_string();
    let running = client.send("POST", "/v1/completions", "", body.as_bytes());
    client.wait_for("moa_requests_total", |requests| requests == 1.0);
    server.end();
    let events = read(running).events();
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "length");
    assert!(std::net::TcpStream::connect(client.0).is_err(), "nobody listens any more");
    // One that does not end in time is told so.
    let grace = Duration::from_millis(50);
    let mut server = Running::new(ServerOptions { grace, ..options() });
    let running =
        server.client.send("POST", "/v1/completions", "", endless(8000).to_string().as_bytes());
    server.client.wait_for("moa_requests_running", |running| running == 1.0);
    server.end();
    assert!(read(running).body.contains("server_stopping"));
}
