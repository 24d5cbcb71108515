//! The numbers of several GPUs, as `--device` takes them.

/// Most GPUs of one run: as many as a machine has.
const MOST: usize = 16;

/// At least two GPUs, each once.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gpus {
    ordinals: [u8; MOST],
    count: usize,
}

impl std::fmt::Debug for Gpus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.ordinals())
    }
}

impl Gpus {
    /// Numbers with commas between them.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut gpus = Self { ordinals: [0; MOST], count: 0 };
        for number in text.split(',') {
            let ordinal: u8 = number.parse().ok()?;
            if gpus.ordinals().contains(&ordinal) || gpus.count == MOST {
                return None;
            }
            gpus.ordinals[gpus.count] = ordinal;
            gpus.count += 1;
        }
        (gpus.count > 1).then_some(gpus)
    }

    /// Their numbers, by rank.
    pub(crate) fn ordinals(&self) -> &[u8] {
        &self.ordinals[..self.count]
    }
}
