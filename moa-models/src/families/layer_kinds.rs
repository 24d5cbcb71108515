//! Which layers have a sliding window, and which do not rotate.

use crate::Result;
use crate::checkpoint::json::JsonObject;
use crate::decoder::config::LayerKind;

/// `layer_types` as kinds of layers, the sliding ones with the field `sliding_window`; if the field is absent,
/// those layers slide of which `slides` says so.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) if a type is not known, there is not one for each layer, or layers
/// slide without a window.
pub(super) fn sliding(
    file: &JsonObject,
    layers: usize,
    window: Option<usize>,
    slides: impl Fn(usize) -> bool,
) -> Result<Vec<LayerKind>> {
    const FIELD: &str = "layer_types";
    let expected = "a list of full_attention and sliding_attention";
    let types = file.list(FIELD, expected, |kind| match kind.as_str() {
        Some("full_attention") => Some(false),
        Some("sliding_attention") => Some(true),
        _ => None,
    })?;
    let types = types.unwrap_or_else(|| (0..layers).map(slides).collect());
    if types.len() != layers {
        return Err(file.invalid(FIELD, &format!("one for each of {layers} layers"), types.len()));
    }
    if window.is_none() && types.contains(&true) {
        return Err(file.invalid("sliding_window", "a number where layers slide", "none"));
    }
    let kind = |slides: bool| LayerKind {
        sliding_window: window.filter(|_| slides),
        ..LayerKind::default()
    };
    Ok(types.into_iter().map(kind).collect())
}

/// The window of families that have a switch for it.
pub(super) fn switched_window(file: &JsonObject, default: Option<usize>) -> Result<Option<usize>> {
    let is_used = file.flag("use_sliding_window")?.unwrap_or(false);
    Ok(window(file, default)?.filter(|_| is_used))
}

/// The field `sliding_window`, with a default where it is absent rather than null.
pub(super) fn window(file: &JsonObject, default: Option<usize>) -> Result<Option<usize>> {
    const FIELD: &str = "sliding_window";
    Ok(file.count(FIELD)?.or(default.filter(|_| !file.names(FIELD))))
}
