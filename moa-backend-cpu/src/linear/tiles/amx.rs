//! AMX: instructions for tiles, which Rust has no functions for.

use std::arch::asm;
use std::sync::OnceLock;

use pulp::x86::V4;

use super::{Multiply, SIDE, Source, Sums, TOGETHER, Tile};
use crate::linear::blocks::Level;

/// A machine with AMX for bf16, and with AVX-512 BF16, that this process may use.
#[derive(Clone, Copy)]
pub(in crate::linear) struct Amx(V4);

impl Amx {
    /// This one, if it is. It is none where the variable `MOA_NO_AMX` is set, to anything but 0 or nothing.
    pub(in crate::linear) fn here() -> Option<Self> {
        static HERE: OnceLock<Option<Amx>> = OnceLock::new();
        *HERE.get_or_init(|| {
            let bf16 = crate::linear::panels::pairs::Machine::here()?;
            let may = Level::has_vnni()
                && !crate::simd::is_set("MOA_NO_AMX")
                && has_tiles()
                && asks_system();
            may.then_some(Amx(bf16.0))
        })
    }
}

/// Whether the processor has tiles and products of bf16, and the system keeps the state of both.
fn has_tiles() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
    /// Bits of leaf 7.
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    /// Bits of the register of states: configuration and data of tiles.
    const STATES: u64 = 3 << 17;

    if !is_x86_feature_detected!("xsave") || __cpuid(0).eax < 7 {
        return false;
    }
    let wanted = AMX_BF16 | AMX_TILE;
    // SAFETY: the system has turned `xsave` on, or it would not have been found.
    __cpuid_count(7, 0).edx & wanted == wanted && unsafe { _xgetbv(0) } & STATES == STATES
}

/// Asks the system for the room that tiles take in a thread's state, once for all threads of the process.
#[cfg(target_os = "linux")]
fn asks_system() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const TILE_DATA: u64 = 18;

    let result: i64;
    // SAFETY: a call that writes no memory of this process; registers that it changes are named.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") TILE_DATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn asks_system() -> bool {
    false
}

/// Palette 1: up to 8 tiles, each of so many rows of so many bytes.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// A thread whose tiles are configured. It has none afterwards, so that the system does not keep them.
pub(in crate::linear) struct Configured(());

impl Drop for Configured {
    fn drop(&mut self) {
        // SAFETY: there is one only on a machine with AMX.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags)) };
    }
}

/// Bytes of a row of a tile, and of a tile.
const LINE: usize = size_of::<Tile>() / SIDE;

/// `products` of four tiles of sums, whose steps of so many bytes are the given lines: tiles 4 and 5 are weights, 6 and 7 activations.
macro_rules! steps {
    ($w:ident, $x:ident, $steps:ident, $sums:ident, $step:expr, $($line:literal,)+) => {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            $($line,)+
            "add {w0}, {step}",
            "add {w1}, {step}",
            "add {x0}, {step}",
            "add {x1}, {step}",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {line}*1], tmm0",
            "tilestored [{sums} + {line}*1 + 1024], tmm1",
            "tilestored [{sums} + {line}*1 + 2048], tmm2",
            "tilestored [{sums} + {line}*1 + 3072], tmm3",
            w0 = inout(reg) $w[0] => _,
            w1 = inout(reg) $w[1] => _,
            x0 = inout(reg) $x[0] => _,
            x1 = inout(reg) $x[1] => _,
            steps = inout(reg) $steps => _,
            line = in(reg) LINE,
            sums = in(reg) $sums,
            step = const $step,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

impl Multiply for Amx {
    type Ready = Configured;

    fn simd(self) -> V4 {
        self.0
    }

    fn ready(self) -> Configured {
        let mut config = Config {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        config.row_bytes[..8].fill(LINE as u16);
        config.rows[..8].fill(SIDE as u8);
        // SAFETY: the machine has AMX, and the system gave this process leave, or there would be no such value.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, preserves_flags)) };
        Configured(())
    }

    #[inline]
    unsafe fn products<S: Source>(
        _: &Configured,
        w: [*const Tile; TOGETHER],
        x: [*const Tile; TOGETHER],
        steps: usize,
        sums: &mut Sums,
    ) {
        const { assert!(size_of::<Tile>() == 1024) };
        let sums: *mut Sums = sums;
        // SAFETY: the tiles are configured, the caller promises what is read, and the sums are 4 tiles. The loop is left
        // after `steps` turns, of which there is one at least.
        unsafe {
            match S::PARTS {
                1 => steps!(
                    w,
                    x,
                    steps,
                    sums,
                    1024,
                    "tileloadd tmm4, [{w0} + {line}*1]",
                    "tileloadd tmm6, [{x0} + {line}*1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm5, [{w1} + {line}*1]",
                    "tdpbf16ps tmm1, tmm5, tmm6",
                    "tileloadd tmm7, [{x1} + {line}*1]",
                    "tdpbf16ps tmm2, tmm4, tmm7",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                ),
                2 => steps!(
                    w,
                    x,
                    steps,
                    sums,
                    2048,
                    "tileloadd tmm4, [{w0} + {line}*1]",
                    "tileloadd tmm6, [{x0} + {line}*1 + 1024]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm5, [{w1} + {line}*1]",
                    "tdpbf16ps tmm1, tmm5, tmm6",
                    "tileloadd tmm7, [{x1} + {line}*1 + 1024]",
                    "tdpbf16ps tmm2, tmm4, tmm7",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "tileloadd tmm6, [{x0} + {line}*1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm5, tmm6",
                    "tileloadd tmm7, [{x1} + {line}*1]",
                    "tdpbf16ps tmm2, tmm4, tmm7",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "tileloadd tmm4, [{w0} + {line}*1 + 1024]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm2, tmm4, tmm7",
                    "tileloadd tmm5, [{w1} + {line}*1 + 1024]",
                    "tdpbf16ps tmm1, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                ),
                _ => unreachable!("no source has such parts"),
            }
        }
    }
}
