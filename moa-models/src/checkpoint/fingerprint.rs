use std::fmt;

/// FNV-1a, 64 bits: cheap, the same on every machine and in every release, and no defence against
/// forgery.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fnv1a(u64);

impl Default for Fnv1a {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv1a {
    pub(crate) fn feed(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

impl fmt::Display for Fnv1a {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Sixteen hex digits that tell one file or plan from another, as the settings of an
/// [`ItemLog`](crate::ItemLog) want it.
pub fn fingerprint(bytes: &[u8]) -> String {
    let mut hash = Fnv1a::default();
    hash.feed(bytes);
    hash.to_string()
}

#[cfg(test)]
mod tests {
    #[test]
    fn known_hash() {
        assert_eq!(super::fingerprint(b"foobar"), "85944171f73967e8");
    }
}
