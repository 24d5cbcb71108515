//! Connections: how many, how slow they may be, and which go when there are too many.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::time::Sleep;

use crate::http;
use crate::metrics::Counted;
use crate::state::State;

/// A connection, as the others see it.
#[derive(Default)]
pub(crate) struct Peer {
    /// Requests whose head was read and whose answer has not ended.
    busy: AtomicUsize,
    /// Those of them whose body has not been read.
    reading: AtomicUsize,
    leave: Notify,
}

impl Peer {
    /// Whether no request is lost if it goes.
    fn is_waiting(&self) -> bool {
        self.busy.load(SeqCst) == self.reading.load(SeqCst)
    }
}

/// While a request's body is read, its connection may go as if it had not sent any.
pub(crate) struct Reading(Arc<Peer>);

impl Reading {
    pub(crate) fn new(peer: Arc<Peer>) -> Self {
        peer.reading.fetch_add(1, SeqCst);
        Self(peer)
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.reading.fetch_sub(1, SeqCst);
    }
}

/// Open connections, the oldest first.
#[derive(Default)]
struct Peers(Mutex<VecDeque<Arc<Peer>>>);

impl Peers {
    fn list(&self) -> std::sync::MutexGuard<'_, VecDeque<Arc<Peer>>> {
        // The list is whole after each change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds one; where there are too many, the oldest one goes that has sent no whole request.
    /// `None` if all of them have.
    fn enter(&self, most: usize) -> Option<Arc<Peer>> {
        let mut list = self.list();
        if list.len() >= most {
            let idle = list.iter().position(|peer| peer.is_waiting())?;
            if let Some(idle) = list.remove(idle) {
                idle.leave.notify_one();
            }
        }
        let peer = Arc::new(Peer::default());
        list.push_back(Arc::clone(&peer));
        Some(peer)
    }

    fn remove(&self, peer: &Arc<Peer>) {
        self.list().retain(|other| !Arc::ptr_eq(other, peer));
    }

    /// Waits until a connection has to go. One whose request has become whole since it was told to is
    /// kept, and counts again.
    async fn told_to_leave(&self, peer: &Arc<Peer>) {
        loop {
            peer.leave.notified().await;
            if peer.is_waiting() {
                return;
            }
            self.list().push_back(Arc::clone(peer));
        }
    }
}

/// Takes connections until the server stops, and then waits for those that are being answered.
pub(crate) async fn accept(
    listener: TcpListener,
    state: Arc<State>,
    mut stop: watch::Receiver<bool>,
) {
    let peers = Arc::new(Peers::default());
    let mut tasks = tokio::task::JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => break,
            Some(_) = tasks.join_next() => continue,
        };
        match accepted {
            Ok((stream, _)) => match peers.enter(state.options.max_connections) {
                Some(peer) => {
                    let of = (stream, Arc::clone(&state), Arc::clone(&peers));
                    tasks.spawn(serve(of, peer, stop.clone()));
                }
                None => refuse(stream),
            },
            // Too many open files, most likely: those that are there go on.
            Err(error) => {
                tracing::warn!("a connection could not be taken: {error}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
    drop(listener);
    while tasks.join_next().await.is_some() {}
}

/// Tells a client that all connections are in use, if it can be told at once.
fn refuse(stream: TcpStream) {
    let answer = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\n\
        content-length: 0\r\n\r\n";
    // The runtime does not know yet that a new stream can be written to; the system does.
    if let Ok(mut stream) = stream.into_std() {
        let _ = std::io::Write::write(&mut stream, answer);
    }
}

async fn serve(
    (stream, state, peers): (TcpStream, Arc<State>, Arc<Peers>),
    peer: Arc<Peer>,
    mut stop: watch::Receiver<bool>,
) {
    let open = Arc::clone(&state);
    let _open = Counted::new(&open.metrics.connections);
    // Tokens are small and come one by one.
    let _ = stream.set_nodelay(true);
    let timeout = state.options.client_timeout;
    let io = TokioIo::new(Timed { stream, timeout, waiting: None });
    let service = service_fn(|mut request: Request<Incoming>| {
        let (state, peer) = (Arc::clone(&state), Arc::clone(&peer));
        request.extensions_mut().insert(Arc::clone(&peer));
        async move {
            let busy = Busy::new(peer);
            let response = http::answer(state, request.map(Body::new)).await;
            // The body of the answer belongs to the request.
            Ok::<_, std::convert::Infallible>(response.map(|body| Held { body, _busy: busy }))
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(timeout)
        .max_buf_size(64 << 10)
        .serve_connection(io, service);
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        _ = stop.wait_for(|stop| *stop) => None,
        () = peers.told_to_leave(&peer) => Some(Ok(())),
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!("a connection ended: {error}");
    }
    peers.remove(&peer);
}

/// A request that is being answered.
struct Busy(Arc<Peer>);

impl Busy {
    fn new(peer: Arc<Peer>) -> Self {
        peer.busy.fetch_add(1, SeqCst);
        Self(peer)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, SeqCst);
    }
}

/// A body that keeps its connection busy.
struct Held {
    body: Body,
    _busy: Busy,
}

impl http_body::Body for Held {
    type Data = axum::body::Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

/// A stream whose other end must take in what is written within a time.
struct Timed {
    stream: TcpStream,
    timeout: Duration,
    /// Runs while a write waits.
    waiting: Option<Pin<Box<Sleep>>>,
}

impl Timed {
    fn watch<T>(
        &mut self,
        context: &mut Context<'_>,
        wrote: Poll<std::io::Result<T>>,
    ) -> Poll<std::io::Result<T>> {
        if wrote.is_ready() {
            self.waiting = None;
            return wrote;
        }
        let timeout = self.timeout;
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(tokio::time::sleep(timeout)));
        match waiting.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(std::io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Timed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Timed {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        let wrote = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.watch(context, wrote)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        let wrote = Pin::new(&mut self.stream).poll_write_vectored(context, bytes);
        self.watch(context, wrote)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        self.watch(context, flushed)
    }

    fn poll_shutdown(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        let shut = Pin::new(&mut self.stream).poll_shutdown(context);
        self.watch(context, shut)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn leaves(peers: &Peers, peer: &Arc<Peer>) -> bool {
        let wait = Duration::from_millis(20);
        tokio::time::timeout(wait, peers.told_to_leave(peer)).await.is_ok()
    }

    #[tokio::test]
    async fn a_request_that_became_whole_keeps_its_connection() {
        let peers = Peers::default();
        let peer = peers.enter(1).unwrap();
        let (busy, reading) = (Busy::new(Arc::clone(&peer)), Reading::new(Arc::clone(&peer)));
        // Its body is not there yet, so that another connection takes its place; then the body comes.
        let other = peers.enter(1).unwrap();
        drop(reading);
        assert!(!leaves(&peers, &peer).await);
        assert_eq!(peers.list().len(), 2);
        drop(busy);
        // The oldest ones go first.
        peers.enter(2).unwrap();
        assert!(leaves(&peers, &other).await);
        peers.enter(2).unwrap();
        assert!(leaves(&peers, &peer).await);
    }
}
