use moa_core::ModelShape;
use moa_core::search::Bound;
use moa_models::{CacheType, CacheTypes, CompressOptions};

use crate::args::{self, parse_count, parse_density};
use crate::error::{Error, Result};
use crate::output::{Context, percent};

/// How large plans may be.
#[derive(Debug, clap::Args)]
pub(crate) struct BudgetArgs {
    /// Largest mean share of the context that heads keep; with --cache-dtype auto, the bytes of such a share in int8,
    /// of which heads in narrower types keep more
    #[arg(long, default_value = "0.25", value_parser = parse_density)]
    pub(crate) density: f64,
    /// Smallest mean share of the context that heads keep, counted as that of --density
    #[arg(long, value_name = "DENSITY", value_parser = parse_density)]
    min_density: Option<f64>,
    /// Smallest share of the context that any single head keeps, for the sake of texts that calibration
    /// says nothing about [default: a quarter of the density, for elastic plans]
    #[arg(long, value_name = "SHARE", value_parser = parse_share)]
    min_share: Option<f64>,
    /// Lengths at which the density is bounded [default: the profiled lengths and twice the
    /// longest]
    #[arg(long, value_delimiter = ',', value_name = "TOKENS,..", value_parser = parse_count)]
    bound_lengths: Vec<usize>,
    /// Most bytes of keys and values in place of --density: a share of those of a dense cache of 16 bits, such as
    /// 12%, at every bound length, or those of one sequence of a length, such as 8192:64MiB. Plans hold keys and
    /// values in int8 then, unless --cache-dtype says another type: nearly twice as many fit, and from about half
    /// of the bytes on all
    #[arg(long, value_delimiter = ',', value_name = "PERCENT%|TOKENS:BYTES,..", value_parser = parse_kv_bytes,
          conflicts_with_all = ["density", "min_density"])]
    kv_bytes: Vec<KvBytes>,
    /// Largest attention time of a decode step, as a share of dense attention's, as measured on this
    /// machine before the search; in addition to the other bounds
    #[arg(long, value_name = "SHARE", value_parser = parse_time)]
    pub(crate) decode_time: Option<f64>,
}

/// A bound on bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum KvBytes {
    /// A share of a dense cache of 16 bits.
    Share(f64),
    /// Bytes at a length.
    At(usize, u64),
}

impl BudgetArgs {
    /// What a density means where heads choose their types; `None` where it is what it says.
    pub(crate) fn meaning(&self, cache_types: CacheTypes) -> Option<String> {
        (cache_types == CacheTypes::PerHead && self.kv_bytes.is_empty()).then(|| {
            format!(
                "the bytes of {} of the keys in int8, of which heads in narrower types keep more",
                percent(self.density)
            )
        })
    }

    /// The types that heads of plans have: within bytes int8, if nothing else is said, as more keys in 8 bits lose
    /// less than fewer in 16.
    pub(crate) fn cache_types(&self, context: &Context) -> CacheTypes {
        match context.cache_dtype {
            None if !self.kv_bytes.is_empty() => CacheTypes::All(CacheType::Int8),
            Some(args::CacheType::Auto) => CacheTypes::PerHead,
            _ if context.cache.dtype().is_some() => CacheTypes::Device,
            _ => CacheTypes::All(context.cache),
        }
    }

    /// The same as options for a model of this shape, whose heads hold keys and values in these types.
    pub(crate) fn options(
        &self,
        shape: ModelShape,
        cache_types: CacheTypes,
        context: &Context,
    ) -> Result<CompressOptions> {
        let slot_bytes = cache_types.first().unwrap_or(context.cache).slot_bytes(shape.head_dim);
        let (mut density, mut bounds) = (self.density, Vec::new());
        for bound in &self.kv_bytes {
            match *bound {
                KvBytes::Share(share) if self.kv_bytes.len() == 1 => {
                    let types = match cache_types {
                        CacheTypes::Device => CacheTypes::All(context.cache),
                        own => own,
                    };
                    density = types.density(share, shape.head_dim)?;
                }
                KvBytes::At(length, bytes) if self.bound_lengths.is_empty() => {
                    bounds.push(Bound::kv_bytes(length, bytes, shape, slot_bytes)?);
                }
                KvBytes::Share(_) => {
                    let expected = "one share and nothing else";
                    return Err(Error::argument("--kv-bytes", expected, "several bounds"));
                }
                KvBytes::At(..) => {
                    let expected = "left out where --kv-bytes names lengths";
                    return Err(Error::argument("--bound-lengths", expected, "lengths"));
                }
            }
        }
        Ok(CompressOptions {
            density,
            cache_types,
            min_density: self.min_density,
            min_share: self.min_share,
            bound_lengths: self.bound_lengths.clone(),
            bounds,
            decode_time: self.decode_time,
            ..CompressOptions::default()
        })
    }
}

/// A share of the context, 0 for none.
fn parse_share(text: &str) -> Result<f64, Error> {
    let fault = || Error::argument("share", "a number from 0 to 1", text);
    text.parse().ok().filter(|share| (0.0..=1.0).contains(share)).ok_or_else(fault)
}

/// A share of a time, not 0.
fn parse_time(text: &str) -> Result<f64, Error> {
    let fault = || Error::argument("share of the time", "a number above 0 and at most 1", text);
    text.parse().ok().filter(|share| *share > 0.0 && *share <= 1.0).ok_or_else(fault)
}

/// `PERCENT%` or `TOKENS:BYTES`.
fn parse_kv_bytes(text: &str) -> Result<KvBytes, Error> {
    let expected = "a share such as 12%, or TOKENS:BYTES, such as 8192:64MiB";
    let fault = || Error::argument("KV bytes", expected, text);
    if let Some(percent) = text.trim().strip_suffix('%') {
        let share = percent.trim().parse::<f64>().map_err(|_| fault())? / 100.0;
        return if share > 0.0 && share <= 1.0 { Ok(KvBytes::Share(share)) } else { Err(fault()) };
    }
    let (length, bytes) = text.split_once(':').ok_or_else(fault)?;
    let length = parse_count(length.trim()).map_err(|_| fault())?;
    Ok(KvBytes::At(length, parse_bytes(bytes.trim()).ok_or_else(fault)?))
}

/// A number of bytes above 0, with a binary unit or none.
fn parse_bytes(text: &str) -> Option<u64> {
    let end = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit = match unit {
        "" | "B" => 1.0,
        "KiB" => 1024.0,
        "MiB" => 1048576.0,
        "GiB" => 1073741824.0,
        _ => return None,
    };
    let bytes = number.trim().parse::<f64>().ok()? * unit;
    (bytes >= 1.0 && bytes < u64::MAX as f64).then_some(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_binary_units() {
        assert_eq!(parse_kv_bytes("8192:64MiB").unwrap(), KvBytes::At(8192, 64 << 20));
        assert_eq!(parse_kv_bytes("1: 1.5 KiB").unwrap(), KvBytes::At(1, 1536));
        assert_eq!(parse_kv_bytes("100:4096").unwrap(), KvBytes::At(100, 4096));
        assert_eq!(parse_kv_bytes("12.5%").unwrap(), KvBytes::Share(0.125));
        for text in [
            "0%",
            "101%",
            "nan%",
            "%",
            "-1%",
            "8192",
            "8192:",
            "0:1KiB",
            "8192:64MB",
            "8192:-1",
            "8192:0",
            "a:1",
            "1:nan",
        ] {
            let message = parse_kv_bytes(text).unwrap_err().to_string();
            assert!(message.contains("8192:64MiB"), "{text}: {message}");
        }
    }
}
