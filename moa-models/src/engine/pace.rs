//! How many guesses a step checks, by measured times.

/// Rows of a step beyond which times are not told apart.
pub(crate) const ROWS: usize = 256;
/// What a row adds to a step's time before it was measured, as a share.
const FIRST_SLOPE: f64 = 0.25;

/// How much of what a larger step takes longer is forgotten with each step.
const FORGOTTEN: f64 = 0.005;

/// Measured times of steps by their rows, from which the number of guesses follows that pays most.
#[derive(Clone, Debug)]
pub(crate) struct Pace {
    seconds: [Option<f64>; ROWS],
    /// Rows of each request in every step that checks guesses, where all have as many.
    pub(crate) wide: Option<usize>,
}

impl Default for Pace {
    fn default() -> Self {
        Self { seconds: [None; ROWS], wide: None }
    }
}

impl Pace {
    /// A step of so many rows took this long.
    pub(crate) fn observe(&mut self, rows: usize, seconds: f64) {
        let plain = self.seconds.iter().flatten().next().copied();
        // A step that waited for something else than its work would keep guesses away.
        let seconds = plain.map_or(seconds, |plain| seconds.min(4.0 * plain));
        for (of, known) in self.seconds.iter_mut().enumerate() {
            match known {
                _ if of == rows => {}
                // What was measured long ago is tried again.
                Some(known) if of > rows && *known > seconds => {
                    *known -= FORGOTTEN * (*known - seconds)
                }
                _ => {}
            }
        }
        let Some(known) = self.seconds.get_mut(rows) else { return };
        *known = Some(known.map_or(seconds, |known| known + 0.2 * (seconds - known)));
    }

    /// The time of a step with `more` rows than the `rows` of a plain one, as a multiple of that one's.
    pub(crate) fn cost(&self, rows: usize, more: usize) -> f64 {
        let more = match self.wide {
            Some(wide) if more > 0 => (wide - 1) * rows,
            _ => more,
        };
        let guess = 1.0 + FIRST_SLOPE * more as f64 / rows as f64;
        let at = |rows: usize| self.seconds(rows);
        let Some(plain) = at(rows) else { return guess };
        if let Some(seconds) = at(rows + more) {
            return seconds / plain;
        }
        // As the next larger step that is known, else the largest one, is slower by its rows.
        let known = |of: usize| Some((of, at(of)?));
        let larger = (rows + more..ROWS).find_map(known);
        let of = larger.or_else(|| (rows + 1..(rows + more).min(ROWS)).rev().find_map(known));
        of.map_or(guess, |(of, seconds)| {
            1.0 + (seconds / plain - 1.0).max(0.0) * more as f64 / (of - rows) as f64
        })
    }

    /// The time of a step of so many rows, if one was measured.
    pub(crate) fn seconds(&self, rows: usize) -> Option<f64> {
        self.seconds.get(rows).copied().flatten()
    }

    /// The time of a step of so many rows, or of as few more or fewer as were measured.
    pub(crate) fn nearest(&self, rows: usize) -> Option<f64> {
        let known = (0..ROWS).filter_map(|of| Some((of, self.seconds(of)?)));
        known.min_by_key(|(of, _)| of.abs_diff(rows)).map(|(_, seconds)| seconds)
    }

    /// How many guesses of each request to check in a step that has room for `room` more rows: those with which the
    /// most tokens a second are expected, and how many times as many as without guesses. `extra` is what it takes
    /// to make them, in plain steps.
    pub(crate) fn shares(
        &self,
        candidates: &[Candidate],
        room: usize,
        extra: impl Fn(&[usize]) -> f64,
    ) -> (Vec<usize>, f64) {
        let plain = candidates.len();
        let (mut shares, mut best) = (vec![0; plain], vec![0; plain]);
        let (mut tokens, mut most) = (plain as f64, plain as f64 * WORTH);
        for more in 1..=room {
            // The guess that is likeliest to be right, with all those before it.
            let gain = |at: usize| match shares[at] < candidates[at].most {
                true => candidates[at].rate.powi(shares[at] as i32 + 1),
                false => 0.0,
            };
            let Some(next) = (0..plain).max_by(|a, b| gain(*a).total_cmp(&gain(*b))) else { break };
            let gained = gain(next);
            if gained <= 0.0 {
                break;
            }
            tokens += gained;
            shares[next] += 1;
            let speed = tokens / (self.cost(plain, more) + extra(&shares));
            if speed > most {
                most = speed;
                best.clone_from(&shares);
            }
        }
        (best, most / plain.max(1) as f64)
    }
}

/// What a request may have checked.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Candidate {
    /// How likely each guess is right, if those before it are.
    pub(crate) rate: f64,
    /// Most guesses.
    pub(crate) most: usize,
}

/// As many guesses as there is room for, in the order of the requests.
pub(crate) fn all_that_fit(candidates: &[Candidate], mut room: usize) -> Vec<usize> {
    let share = |candidate: &Candidate| {
        let share = candidate.most.min(room);
        room -= share;
        share
    };
    candidates.iter().map(share).collect()
}

/// Guesses are checked where they are expected to be faster by this.
pub(crate) const WORTH: f64 = 1.03;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_steps_of_one_width_further_guesses_are_free() {
        let mut pace = Pace { wide: Some(4), ..Pace::default() };
        pace.observe(2, 1.0);
        pace.observe(8, 1.2);
        assert_eq!((pace.cost(2, 0), pace.cost(2, 1), pace.cost(2, 6)), (1.0, 1.2, 1.2));
        let [likely, unlikely] = [0.9, 0.3].map(|rate| Candidate { rate, most: 3 });
        let (shares, speed) = pace.shares(&[likely, unlikely], 6, |_| 0.0);
        assert_eq!(shares, [3, 3]);
        assert!((2.0..2.5).contains(&speed), "{speed}");
        assert_eq!(pace.shares(&[Candidate { rate: 0.1, most: 3 }; 2], 6, |_| 0.0).0, [0, 0]);
    }

    #[test]
    fn shares_follow_measured_times_and_the_room() {
        let mut pace = Pace::default();
        let [likely, unlikely, short] =
            [(0.9, 6), (0.1, 6), (0.8, 2)].map(|(rate, most)| Candidate { rate, most });
        let all = [likely, unlikely, short];
        let shares = |pace: &Pace, of: &[Candidate], room, extra: f64| {
            pace.shares(of, room, |shares| extra * shares.iter().sum::<usize>() as f64).0
        };
        assert_eq!(shares(&pace, &all, 0, 0.0), [0, 0, 0]);
        let some = shares(&pace, &all, 4, 0.0);
        assert!(some.iter().sum::<usize>() <= 4 && some[0] > some[1], "{some:?}");
        // Two rows were slow: more rows will be.
        pace.observe(1, 1.0);
        pace.observe(2, 1.9);
        assert_eq!(shares(&pace, &all[..1], 6, 0.0), [0]);
        let mut pace = Pace::default();
        // A step of more rows takes as many times as long: nothing is gained.
        (0..ROWS).for_each(|rows| pace.observe(rows, rows as f64));
        assert_eq!(shares(&pace, &all, 60, 0.0), [0, 0, 0]);
        // It takes no longer: all that may be right is checked, unless guesses take long to make.
        let mut pace = Pace::default();
        (0..ROWS).for_each(|rows| pace.observe(rows, 1.0));
        assert_eq!(shares(&pace, &all[..1], 60, 0.0), [6]);
        assert!((1..6).contains(&shares(&pace, &all[..1], 60, 0.3)[0]));
        assert_eq!(shares(&pace, &all[..1], 60, 1.0), [0]);
        assert_eq!(all_that_fit(&all, 8), [6, 2, 0]);
    }
}
