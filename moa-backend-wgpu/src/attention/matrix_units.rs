use cubecl::ir::features::{MmaConfig, Plane};
use cubecl::ir::{ElemType, FloatKind};
use moa_core::CacheType;

use super::Limits;
use crate::Device;
use crate::kernels::blocks::{Blocks, CHUNK, PLANE, SIDE};

/// Whether matrix units, also known as tensor cores, multiply in long chunks on f16 caches. They take queries and
/// weights in f16 and sum in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum MatrixUnits {
    /// Where the device has them and the kernel compiles for them: over Vulkan with the feature `vulkan`, over CUDA with
    /// `cuda-cpp`.
    #[default]
    WhereOffered,
    /// Nowhere: queries and weights stay in f32.
    Unused,
    /// The same kernel without them, on any device and slowly: to test what surrounds them.
    Emulated,
}

/// Head dimensions that matrix units are used for.
const HEAD_DIMS: [usize; 3] = [64, 96, 128];

/// Planes of a cube, and keys of a tile: the fastest of what was measured on an H100.
const PLANES: [usize; 3] = [8, 4, 2];
const KEYS: usize = 32;

impl MatrixUnits {
    /// The largest cube that the device allows, if it offers what the kernel needs.
    pub(crate) fn blocks(
        self,
        device: &Device,
        limits: &Limits,
        cache_type: CacheType,
        head_dim: usize,
    ) -> Option<Blocks> {
        let matrix_units = match self {
            Self::WhereOffered => true,
            Self::Unused => return None,
            Self::Emulated => false,
        };
        if cache_type != CacheType::F16
            || !HEAD_DIMS.contains(&head_dim)
            || (matrix_units && !offered(device))
        {
            return None;
        }
        let words = device.loads_matrices_from_words();
        let blocks = |planes| Blocks { planes, keys: KEYS, dim: head_dim, matrix_units, words };
        let fits =
            |b: &Blocks| b.shared_bytes() <= limits.shared_bytes && b.units() <= limits.units;
        PLANES.into_iter().map(blocks).find(fits)
    }
}

pub(crate) fn offered(device: &Device) -> bool {
    let (hardware, features) = (&device.client().properties().hardware, device.client().features());
    let side = SIDE as u32;
    let products = MmaConfig {
        a_type: ElemType::Float(FloatKind::F16),
        b_type: ElemType::Float(FloatKind::F16),
        cd_type: ElemType::Float(FloatKind::F32),
        m: side,
        n: side,
        k: side,
    };
    let planes = [hardware.plane_size_min, hardware.plane_size_max];
    device.has_matrix_units()
        && features.matmul.cmma.contains(&products)
        && planes == [PLANE as u32; 2]
        && features.plane.contains(Plane::Ops)
        && features.plane.contains(Plane::Sync)
}

const _: () = assert!(CHUNK.is_multiple_of(SIDE));
