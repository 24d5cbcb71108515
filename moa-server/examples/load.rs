//! Open-loop load on a server: requests come at random times, whether or not earlier ones are answered.
//!
//! ```sh
//! cargo run --release -p moa-server --example load -- 127.0.0.1:8080 --requests 2000 --rate 50
//! ```
//!
//! Some clients leave in the middle (`--leave`), some send rubbish (`--rubbish`), some allow too little time
//! (`--late`). The others ask greedily one of a few questions, so that each answer can be compared with the first one
//! to its question: an answer that differs was mixed up with another's. With `--random-tokens 4096` questions are so
//! many tokens below `--vocabulary`, each another one unless `--questions` are said, and answers are not compared.
//! Good is an answer whose first token comes within `--good-first` seconds and the others within `--good-each` on
//! average.

use std::collections::HashMap;
use std::error::Error;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use moa_core::SplitMix64;

type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

#[derive(Debug)]
struct Load {
    address: String,
    requests: usize,
    rate: f64,
    questions: usize,
    words: usize,
    tokens: usize,
    leave: f64,
    rubbish: f64,
    late: f64,
    /// 0: prompts are questions in words.
    random_tokens: usize,
    vocabulary: u64,
    good_first: f64,
    good_each: f64,
}

/// What all requests came to.
#[derive(Default)]
struct Tally {
    done: usize,
    left: usize,
    rubbish: usize,
    late: usize,
    busy: usize,
    lost: Vec<String>,
    mixed: usize,
    tokens: usize,
    first: Vec<f64>,
    each: Vec<f64>,
    good: usize,
    answers: HashMap<usize, String>,
}

fn main() -> Result<()> {
    let load = arguments()?;
    let (load, tally) = (Arc::new(load), Arc::new(Mutex::new(Tally::default())));
    let mut random = SplitMix64::new(7);
    let (begin, mut at, mut threads) = (Instant::now(), 0.0, Vec::new());
    for number in 0..load.requests {
        at -= unit(&mut random).max(1e-12).ln() / load.rate;
        let wait = Duration::from_secs_f64(at).saturating_sub(begin.elapsed());
        std::thread::sleep(wait);
        let (load, tally, kind) = (Arc::clone(&load), Arc::clone(&tally), unit(&mut random));
        let cut = unit(&mut random);
        let request = move || one(number, kind, cut, &load, &tally);
        threads.push(std::thread::Builder::new().stack_size(256 << 10).spawn(request)?);
    }
    for thread in threads {
        thread.join().map_err(|_| "a client's thread failed")?;
    }
    let seconds = begin.elapsed().as_secs_f64();
    let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
    let t = &mut *tally;
    println!(
        "{} requests in {seconds:.1} s: {} answered, {} busy (503), {} left, {} timed out, {} refused as rubbish, {} lost, {} mixed up",
        load.requests,
        t.done,
        t.busy,
        t.left,
        t.late,
        t.rubbish,
        t.lost.len(),
        t.mixed
    );
    println!(
        "{:.2} requests/s answered, {:.2} good, {:.1} tokens/s",
        t.done as f64 / seconds,
        t.good as f64 / seconds,
        t.tokens as f64 / seconds
    );
    for (name, times) in [("time to first token", &mut t.first), ("time per token", &mut t.each)] {
        times.sort_by(f64::total_cmp);
        let quantile =
            |q: f64| times.get((q * times.len() as f64) as usize).copied().unwrap_or(0.0);
        println!("{name}: p50 {:.1} ms, p99 {:.1} ms", 1e3 * quantile(0.5), 1e3 * quantile(0.99));
    }
    for lost in t.lost.iter().take(5) {
        println!("lost: {lost}");
    }
    // The loop ends what clients left within a step.
    std::thread::sleep(Duration::from_millis(500));
    let (_, metrics) = answer(send(&load.address, "GET", "/metrics", "")?)?;
    for name in ["moa_requests_running", "moa_requests_queued", "moa_kv_bytes"] {
        let line = metrics
            .lines()
            .find(|line| line.strip_prefix(name).is_some_and(|l| l.starts_with(' ')));
        println!("{}", line.unwrap_or("missing"));
    }
    if t.lost.is_empty() && t.mixed == 0 {
        Ok(())
    } else {
        Err("requests were lost or mixed up".into())
    }
}

/// One client.
fn one(number: usize, kind: f64, cut: f64, load: &Load, tally: &Mutex<Tally>) {
    let told = client(number, kind, cut, load, tally);
    if let Err(error) = told {
        let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
        tally.lost.push(format!("request {number}: {error}"));
    }
}

fn client(number: usize, kind: f64, cut: f64, load: &Load, tally: &Mutex<Tally>) -> Result<()> {
    let note = |change: &dyn Fn(&mut Tally)| {
        change(&mut tally.lock().unwrap_or_else(PoisonError::into_inner));
    };
    let path = "/v1/completions";
    if kind < load.rubbish {
        let bodies = ["{", "[[[[[[", "{\"prompt\": 7}", "{\"prompt\": \"x\", \"n\": -1}", "\u{0}"];
        let (status, _) =
            answer(send(&load.address, "POST", path, bodies[number % bodies.len()])?)?;
        match status {
            400 => note(&|t| t.rubbish += 1),
            503 => note(&|t| t.busy += 1),
            other => return Err(format!("rubbish was answered with {other}").into()),
        }
        return Ok(());
    }
    let question = number % load.questions;
    let words = "the ship sailed on and the stars moved over it ".repeat(load.words.div_ceil(10));
    let late = kind > 1.0 - load.late;
    let timeout = if late { "0.02" } else { "600" };
    let prompt = match load.random_tokens {
        0 => format!("\"Story {question}: {words}\""),
        tokens => {
            let mut random = SplitMix64::new(question as u64);
            let drawn = (0..tokens).map(|_| random.next_u64() % load.vocabulary);
            format!("{:?}", drawn.collect::<Vec<_>>())
        }
    };
    let body = format!(
        "{{\"prompt\": {prompt}, \"max_tokens\": {}, \"temperature\": 0, \
         \"ignore_eos\": true, \"stream\": true, \"timeout\": {timeout}}}",
        load.tokens
    );
    let begin = Instant::now();
    let mut reader = BufReader::new(send(&load.address, "POST", path, &body)?);
    let status = head(&mut reader)?;
    if status == 503 || (late && status == 504) {
        note(&|t| if status == 503 { t.busy += 1 } else { t.late += 1 });
        return Ok(());
    }
    if status != 200 {
        let mut rest = String::new();
        let _ = reader.read_to_string(&mut rest);
        return Err(format!("{status}: {rest}").into());
    }
    let leaves_after =
        (kind < load.rubbish + load.leave).then_some((cut * load.tokens as f64) as usize);
    let (mut text, mut pieces, mut first, mut last) = (String::new(), 0, None, begin);
    let mut line = String::new();
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Err("the stream broke off".into());
        }
        // Lines of the chunked encoding are no data.
        let Some(data) = line.trim_end().strip_prefix("data: ") else { continue };
        if data == "[DONE]" {
            break;
        }
        if data.starts_with("{\"error\"") && late {
            note(&|t| t.late += 1);
            return Ok(());
        }
        let value: serde_json::Value = serde_json::from_str(data)?;
        let piece = value["choices"][0]["text"].as_str().ok_or_else(|| data.to_owned())?;
        if !piece.is_empty() {
            last = Instant::now();
            first.get_or_insert(last);
            pieces += 1;
            text.push_str(piece);
        }
        if leaves_after.is_some_and(|after| pieces > after) {
            note(&|t| t.left += 1);
            return Ok(());
        }
    }
    let first = first.unwrap_or(last);
    note(&|t| {
        t.done += 1;
        t.tokens += load.tokens;
        let until_first = (first - begin).as_secs_f64();
        let each = (last - first).as_secs_f64() / load.tokens.saturating_sub(1).max(1) as f64;
        t.first.push(until_first);
        t.each.push(each);
        t.good += usize::from(until_first <= load.good_first && each <= load.good_each);
        if load.random_tokens > 0 {
            return;
        }
        let known = t.answers.entry(question).or_insert_with(|| text.clone());
        if *known != text {
            t.mixed += 1;
        }
    });
    Ok(())
}

fn send(address: &str, method: &str, path: &str, body: &str) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(600)))?;
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(format!("{head}{body}").as_bytes())?;
    Ok(stream)
}

fn head(reader: &mut impl BufRead) -> Result<u16> {
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.ok_or_else(|| format!("no status: {line:?}"))?;
    while !line.trim_end().is_empty() {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            break;
        }
    }
    Ok(status)
}

fn answer(stream: TcpStream) -> Result<(u16, String)> {
    let mut reader = BufReader::new(stream);
    let (status, mut body) = (head(&mut reader)?, String::new());
    reader.read_to_string(&mut body)?;
    Ok((status, body))
}

fn unit(random: &mut SplitMix64) -> f64 {
    (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

fn arguments() -> Result<Load> {
    let mut arguments = std::env::args().skip(1);
    let mut questions = None;
    let mut load = Load {
        address: arguments.next().ok_or("the server's address is missing")?,
        requests: 1000,
        rate: 20.0,
        questions: 16,
        words: 100,
        tokens: 32,
        leave: 0.1,
        rubbish: 0.1,
        late: 0.05,
        random_tokens: 0,
        vocabulary: 8192,
        good_first: 2.0,
        good_each: 0.05,
    };
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{name} lacks its value"))?;
        let count = || value.parse::<usize>();
        let number = || value.parse::<f64>();
        match name.as_str() {
            "--requests" => load.requests = count()?,
            "--rate" => load.rate = number()?,
            "--questions" => questions = Some(count()?.max(1)),
            "--words" => load.words = count()?,
            "--tokens" => load.tokens = count()?.max(1),
            "--leave" => load.leave = number()?,
            "--rubbish" => load.rubbish = number()?,
            "--late" => load.late = number()?,
            "--random-tokens" => load.random_tokens = count()?,
            "--vocabulary" => load.vocabulary = value.parse::<u64>()?.max(1),
            "--good-first" => load.good_first = number()?,
            "--good-each" => load.good_each = number()?,
            other => return Err(format!("{other} is not known").into()),
        }
    }
    if load.random_tokens > 0 {
        load.questions = usize::MAX;
    }
    load.questions = questions.unwrap_or(load.questions);
    Ok(load)
}
