//! One model on two devices, which are threads here: the server says what it says on one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use moa_core::{ElasticRule, Plan, Sharding};
use moa_models::{
    Brought, Checkpoint, Communicator, Cpu, Device, Dtype, Rank, Shard, Speculation, ThreadRank,
    Wait, on_ranks,
};
use moa_server::{Error, Server, ServerOptions, ShutdownHandle, follow};
use serde_json::{Value, json};

use crate::client::{Client, read};
use crate::{Running, checkpoint, folder, narrow};

/// A rank that can be made to break down.
struct Breaking {
    rank: Arc<ThreadRank>,
    breaks: &'static AtomicBool,
    how: Breaks,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Breaks {
    Fails,
    Hangs,
}

impl Rank for Breaking {
    fn rank(&self) -> usize {
        self.rank.rank()
    }

    fn ranks(&self) -> usize {
        self.rank.ranks()
    }

    fn fail(&self) {
        self.rank.fail();
    }

    fn failed(&self) -> Option<usize> {
        self.rank.failed()
    }

    fn gather(&self, own: Brought, wait: Wait) -> moa_models::Result<Arc<[Brought]>> {
        self.rank.gather(own, wait)
    }
}

impl Communicator<Cpu> for Breaking {
    fn all_reduce(&self, device: &Cpu, x: &mut <Cpu as Device>::Tensor) -> moa_models::Result<()> {
        if self.rank() == 1 && self.breaks.load(Ordering::Relaxed) {
            match self.how {
                Breaks::Fails => return Err(moa_models::Error::Cancelled),
                // Longer than the others wait.
                Breaks::Hangs => std::thread::sleep(2 * SHORT),
            }
        }
        self.rank.all_reduce(device, x)
    }
}

const SHORT: Duration = Duration::from_secs(3);

/// A server of two ranks on a thread of its own, which ends with this.
struct Ranks {
    client: Client,
    stop: ShutdownHandle,
    thread: Option<JoinHandle<Result<(), Error>>>,
}

impl Ranks {
    fn new(plan: Plan, options: ServerOptions) -> Self {
        Self::bind(plan, options, Duration::from_secs(60), |rank| rank).expect("a server")
    }

    fn bind<C: Communicator<Cpu> + 'static>(
        plan: Plan,
        mut options: ServerOptions,
        patience: Duration,
        wrap: impl Fn(Arc<ThreadRank>) -> C + Send + Sync + 'static,
    ) -> Result<Self, Error> {
        options.address.set_port(0);
        let (told, address) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let sharding = Sharding::balanced(&plan, 512, 2)?;
            let work = |rank: Arc<ThreadRank>| {
                let shard = Shard::new(&sharding, wrap(rank))?;
                let part = Checkpoint::open_shard(Cpu::new(Dtype::F32), folder(), shard)?;
                if !part.model.is_first() {
                    return follow(part, plan.clone(), options.clone());
                }
                let server = Server::bind(part, plan.clone(), options.clone())?;
                let _ = told.send((server.address(), server.shutdown_handle()));
                server.run()
            };
            on_ranks(ThreadRank::group_with(2, patience)?, work).map(drop)
        });
        match address.recv() {
            Ok((address, stop)) => Ok(Self { client: Client(address), stop, thread: Some(thread) }),
            Err(_) => Err(thread.join().expect("no panic").expect_err("no server")),
        }
    }

    /// Waits for the server's end.
    fn ended(&mut self) -> Result<(), Error> {
        self.thread.take().map_or(Ok(()), |thread| thread.join().expect("no panic"))
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        self.stop.shutdown();
        let ended = self.ended();
        assert!(std::thread::panicking() || ended.is_ok(), "{ended:?}");
    }
}

/// Requests of many kinds, all sent before the first is answered, and a conversation.
fn talk(client: Client) -> Vec<Value> {
    let long = "The history of navigation is the history of people who trusted numbers. ".repeat(6);
    let requests = [
        json!({ "prompt": &long, "max_tokens": 24, "temperature": 0 }),
        json!({ "prompt": "Once upon a time", "max_tokens": 40, "temperature": 0.9, "seed": 5 }),
        json!({ "prompt": &long[40..], "max_tokens": 12, "n": 3, "temperature": 0.8, "seed": 7 }),
        json!({ "prompt": "Ships", "max_tokens": 60, "temperature": 0, "stop": ["the"] }),
        json!({ "prompt": "The sea", "max_tokens": 20, "temperature": 0, "logprobs": 2,
                "presence_penalty": 0.5 }),
    ];
    let sockets: Vec<_> = requests
        .iter()
        .map(|body| client.send("POST", "/v1/completions", "", body.to_string().as_bytes()))
        .collect();
    let mut said: Vec<Value> = sockets
        .into_iter()
        .map(|socket| {
            let answer = read(socket);
            assert_eq!(answer.status, 200, "{}", answer.body);
            let choices = answer.json()["choices"].clone();
            let choices = choices.as_array().expect("choices").iter();
            choices.map(|own| json!([own["index"], own["text"], own["finish_reason"]])).collect()
        })
        .collect();
    let mut messages = vec![json!({ "role": "user", "content": long })];
    for turn in 0..3 {
        let body = json!({ "messages": messages, "max_tokens": 10, "temperature": 0 });
        let answer = client.ask("/v1/chat/completions", &body);
        let text = answer["choices"][0]["message"]["content"].clone();
        said.push(json!([text, answer["usage"]]));
        messages.push(json!({ "role": "assistant", "content": text }));
        messages.push(json!({ "role": "user", "content": format!("And then? {turn}") }));
    }
    said
}

#[test]
fn two_ranks_serve_the_texts_of_one() {
    let speculations = [
        Speculation::Off,
        Speculation::Ngram { draft_tokens: 4, adaptive: false },
        Speculation::ngram(),
    ];
    for speculation in speculations {
        let options = ServerOptions { speculation, prefix_every: 64, ..ServerOptions::default() };
        let one = talk(Running::new(options.clone()).client);
        let ranks = Ranks::new(narrow(), options);
        assert_eq!(talk(ranks.client), one, "{speculation:?}");
        assert_eq!(ranks.client.metric("moa_kv_bytes"), 0.0);
        assert_eq!(ranks.client.metric("moa_requests_queued"), 0.0);
        assert!(ranks.client.metric("moa_prefix_hits_total") >= 2.0);
    }
}

#[test]
fn sequences_are_cut_only_where_the_rings_of_all_ranks_allow_it() {
    // One head alone forgets keys, so that one rank could cut its part of a sequence anywhere.
    let shape = checkpoint().model.shape();
    let full = ElasticRule::new(0.0, 1.0).unwrap();
    let rules = (0..shape.layers * shape.kv_heads)
        .map(|head| if head == 0 { ElasticRule::fixed(32) } else { full }.into());
    let plan = Plan::new(shape, 8, 9, rules.collect()).unwrap();
    let one = Running::with_plan(plan.clone(), ServerOptions::default());
    let two = Ranks::new(plan, ServerOptions::default());
    let text = "Sailors measured the height of the sun at noon and wrote it down. ".repeat(5);
    let ask = |client: Client, end: &str| {
        let prompt = format!("{text}{end}");
        let answer = client.ask(
            "/v1/completions",
            &json!({ "prompt": prompt, "max_tokens": 8, "temperature": 0 }),
        );
        (answer["choices"][0]["text"].clone(), answer["usage"].clone())
    };
    for end in ["Then they", "And the stars", "And the stars at", "Then they"] {
        assert_eq!(ask(two.client, end), ask(one.client, end), "{end}");
    }
}

#[test]
fn clients_of_ranks_that_leave_or_wait_too_long_end_their_requests_everywhere() {
    let ranks = Ranks::new(narrow(), ServerOptions { max_batch: 2, ..ServerOptions::default() });
    let client = ranks.client;
    let endless =
        json!({ "prompt": "The sea", "max_tokens": 6000, "ignore_eos": true, "stream": true });
    let send = || client.send("POST", "/v1/completions", "", endless.to_string().as_bytes());
    let sockets = [send(), send(), send()];
    client.wait_for("moa_requests_running", |running| running == 2.0);
    client.wait_for("moa_requests_queued", |queued| queued == 1.0);
    drop(sockets);
    client.wait_for("moa_requests_running", |running| running == 0.0);
    client.wait_for("moa_requests_queued", |queued| queued == 0.0);
    let mut late = endless.clone();
    (late["timeout"], late["stream"]) = (0.05.into(), false.into());
    let answer = client.post("/v1/completions", &late);
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (504, &json!("timeout")));
    let answer = client.ask("/v1/completions", &json!({ "prompt": "Hi", "max_tokens": 3 }));
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
}

#[test]
fn a_rank_that_fails_or_hangs_ends_all_requests() {
    for how in [Breaks::Fails, Breaks::Hangs] {
        let breaks: &'static AtomicBool = Box::leak(Box::new(AtomicBool::new(false)));
        let wrap = move |rank| Breaking { rank, breaks, how };
        let options = ServerOptions { max_batch: 2, ..ServerOptions::default() };
        let mut ranks = Ranks::bind(narrow(), options, SHORT, wrap).expect("a server");
        let client = ranks.client;
        let endless = json!({ "prompt": "The sea", "max_tokens": 6000, "ignore_eos": true });
        let send = || client.send("POST", "/v1/completions", "", endless.to_string().as_bytes());
        let sockets = [send(), send(), send()];
        client.wait_for("moa_requests_running", |running| running == 2.0);
        client.wait_for("moa_requests_queued", |queued| queued == 1.0);
        breaks.store(true, Ordering::Relaxed);
        let answers = sockets.map(read);
        let mut statuses = answers.each_ref().map(|answer| answer.status);
        statuses.sort_unstable();
        assert_eq!(statuses, [500, 500, 503], "{how:?}: {answers:?}");
        assert!(answers.iter().all(|answer| answer.json()["error"]["message"].is_string()));
        let ended = ranks.ended();
        let is_typed = match how {
            Breaks::Fails => matches!(ended, Err(Error::Model(moa_models::Error::Cancelled))),
            Breaks::Hangs => {
                matches!(ended, Err(Error::Model(moa_models::Error::RankSilent { rank: 1, .. })))
            }
        };
        assert!(is_typed, "{how:?}: {ended:?}");
    }
}

#[test]
fn what_ranks_cannot_do_is_refused_at_the_start() {
    let refused = |options: ServerOptions| {
        Ranks::bind(narrow(), options, SHORT, |rank| rank).map(drop).unwrap_err().to_string()
    };
    let draft = ServerOptions { speculation: Speculation::draft(), ..ServerOptions::default() };
    assert!(refused(draft).contains("speculation must be"));
    let host = ServerOptions { prefix_host: 1 << 20, ..ServerOptions::default() };
    assert!(refused(host).contains("prefix_host must be 0"));
    let whole = follow(checkpoint(), narrow(), ServerOptions::default());
    assert!(matches!(whole, Err(Error::Option { what: "model", .. })), "{whole:?}");
}
