//! From calibration data to a plan: profile, search, refinement by measured loss.

pub(crate) mod calibrate;
pub(crate) mod compress;
pub(crate) mod evidence;
pub(crate) mod exchange;
pub(crate) mod facts;
pub(crate) mod measure;
pub(crate) mod objective;
pub(crate) mod precision;
pub(crate) mod probe;
pub(crate) mod profile;
pub(crate) mod profile_all;
pub(crate) mod prompts;
pub(crate) mod records;
pub(crate) mod refine;
pub(crate) mod table;
pub(crate) mod task_items;
pub(crate) mod tasks;
pub(crate) mod text;
pub(crate) mod text_items;
