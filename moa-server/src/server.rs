use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::mpsc;

use moa_core::Plan;
use moa_models::{Checkpoint, Math};
use serde_json::json;
use tokio::net::{TcpListener, TcpSocket};
use tokio::runtime::Runtime;
use tokio::sync::watch;

use crate::connections;
use crate::error::{Error, Result};
use crate::options::ServerOptions;
use crate::state::State;
use crate::worker::{Command, Worker};

/// A server that listens, and answers when it [runs](Self::run).
pub struct Server<D: Math> {
    worker: Worker<D>,
    state: Arc<State>,
    runtime: Runtime,
    listener: TcpListener,
    address: SocketAddr,
    stop: Arc<watch::Sender<bool>>,
}

impl<D: Math> std::fmt::Debug for Server<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Server({} at {})", self.state.model.name, self.address)
    }
}

/// Stops a server from another thread.
#[derive(Clone, Debug)]
pub struct ShutdownHandle(Arc<watch::Sender<bool>>);

impl ShutdownHandle {
    /// Tells the server to take no more requests, to end those that it has, and to return from
    /// [`Server::run`].
    pub fn shutdown(&self) {
        self.0.send_replace(true);
    }
}

impl<D: Math + 'static> Server<D> {
    /// Listens for requests to a model that runs with the spans of a plan. Nothing is answered yet.
    ///
    /// Where several devices share the model, this is for the first one, and the others [`follow`] it.
    ///
    /// # Errors
    /// [`Error::Option`] if a limit lets nothing through or is beyond the model's context, if
    /// [`kv_memory`](ServerOptions::kv_memory) has no room for the shortest request, if a name, key or origin is none,
    /// or if several devices share the model and [`prefix_host`](ServerOptions::prefix_host) or a model that guesses is asked for; [`Error::Core`] with
    /// [`ShapeMismatch`](moa_core::Error::ShapeMismatch) if the plan is for a model of other
    /// dimensions, [`Error::Bind`] if the address cannot be listened on, [`Error::Runtime`] if there
    /// are no threads.
    pub fn bind(checkpoint: Checkpoint<D>, plan: Plan, options: ServerOptions) -> Result<Self> {
        check(&checkpoint, &plan, &options)?;
        if !checkpoint.model.is_first() {
            return Err(Error::option("model", "the first device's part", "another one's"));
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            // They turn texts into tokens.
            .max_blocking_threads(4)
            .thread_name("moa-http")
            .enable_all()
            .build()
            .map_err(Error::Runtime)?;
        let bind = |source| Error::Bind { address: options.address, source };
        let listener = runtime.block_on(async { listen(options.address) }).map_err(bind)?;
        let address = listener.local_addr().map_err(bind)?;
        let (commands, jobs) = mpsc::channel();
        let (stop, _) = watch::channel(false);
        let own = checkpoint.model.config().windowed(&plan)?.into_owned();
        let shape = own.shape();
        let context = options.context(&checkpoint.model);
        let mut lengths: Vec<usize> = LENGTHS.into_iter().filter(|n| *n < context).collect();
        lengths.push(context);
        let told = json!({
            "layers": shape.layers,
            "kv_heads": shape.kv_heads,
            "query_heads": shape.query_heads,
            "sink": own.sink(),
            "lengths": lengths.iter().map(|&length| json!({
                "length": length,
                "label": label(length),
                "spans": own.spans(length).iter().map(|span| span.total().min(length))
                    .collect::<Vec<_>>(),
                "density": own.density(length),
            })).collect::<Vec<_>>(),
        });
        let fingerprint = moa_models::fingerprint(told.to_string().as_bytes());
        let slack = options.speculation.draft_tokens();
        let has_rings = checkpoint.model.has_rings(&plan, context, slack)?;
        let state = State::new(&checkpoint, told, &fingerprint, has_rings, options, commands);
        let state = Arc::new(state);
        let (own, metrics) = (state.options.clone(), Arc::clone(&state.metrics));
        let worker = Worker::new(checkpoint, plan, own, metrics, jobs);
        let (least, memory) = (worker.sizes(1)?.bytes, state.options.kv_memory);
        if memory < least {
            let expected = format!("at least the {least} bytes of the shortest request");
            return Err(Error::option("kv_memory", expected, memory));
        }
        Ok(Self { worker, state, runtime, listener, address, stop: Arc::new(stop) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The model's name in requests.
    pub fn model_name(&self) -> &str {
        &self.state.model.name
    }

    /// How many requests of this length, prompt and answer together, run at once in
    /// [`ServerOptions::kv_memory`]: with the plan, and with dense attention. A shorter one than
    /// [`ServerOptions::min_context`] counts as that, a longer one than the context as the context.
    ///
    /// # Errors
    /// [`Error::Model`] if the model cannot follow the plan.
    pub fn fitting(&self, length: usize) -> Result<(u64, u64)> {
        let sizes = self.worker.sizes(length)?;
        let memory = self.state.options.kv_memory;
        Ok((memory / sizes.bytes.max(1), memory / sizes.dense_bytes.max(1)))
    }

    /// Stops this server from another thread.
    pub fn shutdown_handle(&self) -> ShutdownHandle {
        ShutdownHandle(Arc::clone(&self.stop))
    }

    /// Serves until it is told to stop; the model runs on the calling thread.
    ///
    /// # Errors
    /// [`Error::Model`] if the device fails for good.
    pub fn run(self) -> Result<()> {
        let Self { mut worker, state, runtime, listener, stop, .. } = self;
        if state.options.handle_signals {
            runtime.spawn(signals(Arc::clone(&stop)));
        }
        runtime.spawn(wait_for_stop(Arc::clone(&state), stop.subscribe()));
        let accepting =
            runtime.spawn(connections::accept(listener, Arc::clone(&state), stop.subscribe()));
        let ran = worker.run();
        // Nobody waits for what came too late.
        drop(worker);
        // What the loop said last goes out.
        let grace = std::time::Duration::from_secs(2);
        runtime.block_on(async {
            let _ = tokio::time::timeout(grace, accepting).await;
        });
        runtime.shutdown_timeout(std::time::Duration::from_millis(100));
        Ok(ran?)
    }
}

/// The part in a [`Server`] of another device than the first of those that share a model: does what the first one does, and
/// returns when that does. All are given the same plan and options.
///
/// # Errors
/// Those of [`Server::bind`] but [`Error::Bind`], and [`Error::Option`] for the first device or a whole model;
/// [`Error::Model`] if a device fails.
pub fn follow<D: Math + 'static>(
    checkpoint: Checkpoint<D>,
    plan: Plan,
    options: ServerOptions,
) -> Result<()> {
    check(&checkpoint, &plan, &options)?;
    if checkpoint.model.is_first() {
        return Err(Error::option("model", "a part that is not the first device's", "the first"));
    }
    // Commands come with what the first one decides.
    let (_, commands) = mpsc::channel();
    Ok(Worker::new(checkpoint, plan, options, Arc::default(), commands).run()?)
}

/// What is so on all devices that share a model.
fn check<D: Math>(checkpoint: &Checkpoint<D>, plan: &Plan, options: &ServerOptions) -> Result<()> {
    options.validate()?;
    options.check_context(&checkpoint.model)?;
    options.check_ranks(checkpoint.model.ranks())?;
    Ok(plan.check_shape(&checkpoint.model.shape())?)
}

/// Lengths at which the page shows the plan.
const LENGTHS: [usize; 4] = [1024, 4096, 16384, 65536];

/// A length for a reader: in units of 1,024 where there is no rest.
fn label(length: usize) -> String {
    match length % 1024 {
        0 => format!("{}k tokens", length / 1024),
        _ => format!("{length} tokens"),
    }
}

async fn wait_for_stop(state: Arc<State>, mut stop: watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
    state.stopping.store(true, SeqCst);
    // The loop has ended already where nobody listens.
    let _ = state.commands.send(Command::Stop);
}

/// Stops at the signals that ask a process to end.
async fn signals(stop: Arc<watch::Sender<bool>>) {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = match signal(SignalKind::terminate()) {
            Ok(terminate) => terminate,
            Err(error) => return tracing::warn!("SIGTERM is not handled: {error}"),
        };
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        }
    }
    #[cfg(not(unix))]
    let _ = tokio::signal::ctrl_c().await;
    stop.send_replace(true);
    // A second one does not wait for anybody.
    let _ = tokio::signal::ctrl_c().await;
    std::process::exit(130);
}

/// Connections that may wait to be taken. One beyond them is tried again by its client after a second.
const BACKLOG: u32 = 1024;

/// Listens as [`TcpListener::bind`] does, but with room for more than 128 connections that come at once.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // Elsewhere it lets two programs have one address.
    #[cfg(unix)]
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}
