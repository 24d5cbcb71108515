//! A thread that copies sequences to host memory.

use std::collections::VecDeque;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use moa_models::{Decoder, Math, OffloadedSequence, Sequence};

use super::prefix::Entry;

/// Copies sequences to host memory, one after the other, while others run. A sequence stays on the device, and can be
/// gone on from, until its copy is [taken](Self::take).
pub(super) struct Copier<D: Math> {
    /// What it has not copied yet, in its order.
    copying: VecDeque<Copying<D>>,
    /// Dropped to end the thread.
    tasks: Option<mpsc::Sender<Task<D>>>,
    /// `None` for one that cannot be copied. Dropped to end the thread before all are copied.
    copies: Option<mpsc::Receiver<Option<OffloadedSequence>>>,
    thread: Option<JoinHandle<()>>,
}

/// A sequence that is being copied.
pub(super) struct Copying<D: Math> {
    pub(super) entry: Entry<Arc<Sequence<D>>>,
    /// Bytes of the copy.
    pub(super) host_bytes: u64,
}

struct Task<D: Math> {
    /// Copies that made room for this one: giving back so much memory takes a while too.
    gone: Vec<OffloadedSequence>,
    sequence: Arc<Sequence<D>>,
}

impl<D: Math + 'static> Copier<D> {
    /// `None` where there is no thread to be had.
    pub(super) fn new(model: Arc<Decoder<D>>) -> Option<Self> {
        let (tasks, to_do) = mpsc::channel::<Task<D>>();
        let (done, copies) = mpsc::channel();
        let run = move || {
            for Task { gone, sequence } in to_do {
                drop(gone);
                // What cannot be copied is not worth an error.
                let copy = model.offload(&sequence).ok();
                // Whoever takes the copy gives the memory back, as the last that holds it.
                drop(sequence);
                if done.send(copy).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("moa copies".to_owned()).spawn(run).ok()?;
        Some(Self {
            copying: VecDeque::new(),
            tasks: Some(tasks),
            copies: Some(copies),
            thread: Some(thread),
        })
    }

    /// Has a sequence copied once those before it are, and drops what went for it. Gives back whether it will be.
    pub(super) fn copy(&mut self, new: Copying<D>, gone: Vec<OffloadedSequence>) -> bool {
        let task = Task { gone, sequence: Arc::clone(&new.entry.sequence) };
        let is_sent = self.tasks.as_ref().is_some_and(|tasks| tasks.send(task).is_ok());
        if is_sent {
            self.copying.push_back(new);
        }
        is_sent
    }

    /// What it has not copied yet.
    pub(super) fn entries(&self) -> impl Iterator<Item = &Entry<Arc<Sequence<D>>>> {
        self.copying.iter().map(|one| &one.entry)
    }

    /// The next copy that is made, or where it is waited for, that will be; with no sequence if that could not be
    /// copied.
    pub(super) fn take(&mut self, waits: bool) -> Option<(Copying<D>, Option<OffloadedSequence>)> {
        if self.copying.is_empty() {
            return None;
        }
        let copies = self.copies.as_ref()?;
        let copy = match waits {
            true => copies.recv().ok().flatten(),
            false => match copies.try_recv() {
                Err(mpsc::TryRecvError::Empty) => return None,
                // The thread is gone, and copies nothing any more.
                Err(mpsc::TryRecvError::Disconnected) => None,
                Ok(copy) => copy,
            },
        };
        Some((self.copying.pop_front()?, copy))
    }
}

impl<D: Math> Drop for Copier<D> {
    fn drop(&mut self) {
        self.tasks = None;
        // The thread ends with the copy in hand: nobody takes the rest.
        self.copies = None;
        if let Some(thread) = self.thread.take() {
            // If it panicked, that was told of already.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
impl<D: Math> Copier<D> {
    /// One that never comes to copy anything, with what keeps it so.
    pub(super) fn idle() -> (Self, impl Sized) {
        let (tasks, to_do) = mpsc::channel();
        let (done, copies) = mpsc::channel();
        let copier = Self {
            copying: VecDeque::new(),
            tasks: Some(tasks),
            copies: Some(copies),
            thread: None,
        };
        (copier, (to_do, done))
    }
}
