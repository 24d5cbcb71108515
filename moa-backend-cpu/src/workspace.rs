use std::cell::RefCell;

use pulp::{Simd, WithSimd};

use crate::Result;
use crate::simd::dispatch;
use crate::zeroed::zeroed;

/// Scratch memory of one thread, kept between calls. Parts are handed out once per task and hold
/// whatever the last task left there.
#[derive(Default)]
pub(crate) struct Workspace {
    buffer: Vec<Line>,
}

/// A line of near memory. Vectors of 64 bytes that lie across two lines are read at half the speed.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

const LINE: usize = 16;

// SAFETY: an array of floats, as large as its alignment.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for Line {}

thread_local! {
    static WORKSPACE: RefCell<Workspace> = RefCell::default();
}

/// SIMD code that needs scratch memory.
pub(crate) trait Task {
    type Output;

    /// To be inlined into code compiled for the instruction set.
    fn run<S: Simd>(self, simd: S, workspace: &mut Workspace) -> Self::Output;
}

struct WithWorkspace<'a, T> {
    task: T,
    workspace: &'a mut Workspace,
}

impl<T: Task> WithSimd for WithWorkspace<'_, T> {
    type Output = T::Output;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> T::Output {
        self.task.run(simd, self.workspace)
    }
}

/// Runs a task with this thread's workspace and the best instruction set of this machine.
pub(crate) fn run<T: Task>(task: T) -> T::Output {
    // The workspace is borrowed outside of the SIMD code: a closure in between would not be
    // compiled for the instruction set.
    Workspace::with(|workspace| dispatch(WithWorkspace { task, workspace }))
}

impl Workspace {
    /// Runs `body` with this thread's workspace.
    pub(crate) fn with<R>(body: impl FnOnce(&mut Self) -> R) -> R {
        WORKSPACE.with(|workspace| match workspace.try_borrow_mut() {
            Ok(mut workspace) => body(&mut workspace),
            Err(_) => body(&mut Self::default()),
        })
    }

    /// Buffers of the given lengths, each of which begins with a line of near memory.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub(crate) fn parts<const N: usize>(&mut self, lens: [usize; N]) -> Result<[&mut [f32]; N]> {
        let total = lens.iter().map(|len| len.div_ceil(LINE)).sum();
        if self.buffer.len() < total {
            // Nothing in it is worth a copy.
            self.buffer = Vec::new();
            self.buffer = zeroed(total, "scratch memory")?;
        }
        let mut rest = &mut self.buffer[..];
        Ok(lens.map(|len| {
            let (part, tail) = std::mem::take(&mut rest).split_at_mut(len.div_ceil(LINE));
            rest = tail;
            &mut bytemuck::cast_slice_mut(part)[..len]
        }))
    }
}
