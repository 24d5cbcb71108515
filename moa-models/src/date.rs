use chrono::{Datelike, Timelike};

/// A moment of local time, for chat templates that tell the model the date.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Date {
    /// Days since 1970-01-01, which was a Thursday.
    days: i64,
    /// Seconds since midnight.
    seconds: u32,
    micros: u32,
}

/// Days from the first of January of year 1, counted from 1, to 1970-01-01.
const DAYS_TO_1970: i64 = 719_163;

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] =
    ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

impl Date {
    /// The time here, as Python's `datetime.now()`.
    pub(crate) fn now() -> Self {
        let now = chrono::Local::now();
        let days = i64::from(now.num_days_from_ce()) - DAYS_TO_1970;
        let micros = (now.nanosecond() / 1000).min(999_999);
        Self { days, seconds: now.num_seconds_from_midnight(), micros }
    }

    /// Midnight of a day of the proleptic Gregorian calendar; `None` when there is no such day.
    pub(crate) fn new(year: i32, month: u32, day: u32) -> Option<Self> {
        if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
            return None;
        }
        let days = days_before(year) + day_of_year(year, month, day);
        let date = Self { days, seconds: 0, micros: 0 };
        (date.civil() == (year, month, day)).then_some(date)
    }

    /// Formats as Python's `strftime` does in the C locale on Linux, flags included; the time zone of a
    /// naive time is empty. Unknown directives stay as they are.
    pub(crate) fn strftime(self, format: &str) -> String {
        let mut out = String::new();
        let mut rest = format;
        while let Some((before, from)) = rest.split_once('%') {
            out.push_str(before);
            let flags = from.find(|c| !"-_0^#".contains(c)).unwrap_or(from.len());
            let (flags, from) = from.split_at(flags);
            let width = from.find(|c: char| !c.is_ascii_digit()).unwrap_or(from.len());
            let (width, from) = from.split_at(width);
            rest = from;
            let directive = from.chars().next();
            match directive.and_then(|directive| self.field(directive)) {
                Some(field) => {
                    // No template needs more, and a stranger chooses it.
                    let width = width.parse::<usize>().ok().map(|width| width.min(255));
                    out.push_str(&field.text(flags, width));
                    rest = &from[directive.map_or(0, char::len_utf8)..];
                }
                None => out.extend(["%", flags, width]),
            }
        }
        out + rest
    }

    fn field(self, directive: char) -> Option<Field> {
        let (year, month, day) = self.civil();
        let weekday = WEEKDAYS[self.days.rem_euclid(7) as usize];
        let month_name = MONTHS[month as usize - 1];
        let (hour, minute, second) =
            (self.seconds / 3600, self.seconds / 60 % 60, self.seconds % 60);
        let hour_of_12 = (hour + 11) % 12 + 1;
        let half = if hour < 12 { "AM" } else { "PM" };
        let day_of_year = self.days - days_before(year);
        // From 0 for Sunday.
        let day_of_week = (self.days + 4).rem_euclid(7);
        let (iso_year, iso_week) = self.iso_week();
        let zeros = |n: i64, width: usize| Field::Number(n, width, '0');
        let spaces = |n: u32| Field::Number(n.into(), 2, ' ');
        let text = |text: &str| Field::Text(text.to_owned());
        let whole = |format: &str| Field::Text(self.strftime(format));
        Some(match directive {
            'a' => text(&weekday[..3]),
            'A' => text(weekday),
            'b' | 'h' => text(&month_name[..3]),
            'B' => text(month_name),
            'c' => whole("%a %b %e %H:%M:%S %Y"),
            'C' => zeros(i64::from(year.div_euclid(100)), 2),
            'd' => zeros(day.into(), 2),
            'D' | 'x' => whole("%m/%d/%y"),
            'e' => spaces(day),
            'f' => zeros(self.micros.into(), 6),
            'F' => whole("%Y-%m-%d"),
            'g' => zeros(i64::from(iso_year.rem_euclid(100)), 2),
            'G' => Field::Number(iso_year.into(), 1, '0'),
            'H' => zeros(hour.into(), 2),
            'I' => zeros(hour_of_12.into(), 2),
            'j' => zeros(day_of_year + 1, 3),
            'k' => spaces(hour),
            'l' => spaces(hour_of_12),
            'm' => zeros(month.into(), 2),
            'M' => zeros(minute.into(), 2),
            'n' => text("\n"),
            'p' => text(half),
            'P' => text(&half.to_lowercase()),
            'r' => whole("%I:%M:%S %p"),
            'R' => whole("%H:%M"),
            'S' => zeros(second.into(), 2),
            't' => text("\t"),
            'T' | 'X' => whole("%H:%M:%S"),
            'u' => zeros((day_of_week + 6) % 7 + 1, 1),
            'U' => zeros((day_of_year + 7 - day_of_week) / 7, 2),
            'V' => zeros(iso_week.into(), 2),
            'w' => zeros(day_of_week, 1),
            'W' => zeros((day_of_year + 7 - (day_of_week + 6) % 7) / 7, 2),
            'y' => zeros(i64::from(year.rem_euclid(100)), 2),
            'Y' => Field::Number(year.into(), 1, '0'),
            'z' | 'Z' => text(""),
            '%' => text("%"),
            _ => return None,
        })
    }

    /// Year and week of ISO 8601: a week belongs to the year that has its Thursday.
    fn iso_week(self) -> (i32, u32) {
        let thursday = self.days - (self.days + 3).rem_euclid(7) + 3;
        let (year, _, _) = Self { days: thursday, ..self }.civil();
        (year, ((thursday - days_before(year)) / 7 + 1) as u32)
    }

    /// Year, month and day.
    fn civil(self) -> (i32, u32, u32) {
        // Start from a year that is never too late and at most two years early.
        let mut year = (self.days.div_euclid(366) + 1970) as i32;
        if self.days < 0 {
            year = (self.days.div_euclid(365) + 1970) as i32;
        }
        while days_before(year + 1) <= self.days {
            year += 1;
        }
        let day = self.days - days_before(year);
        let month = (1..12).find(|m| day_of_year(year, m + 1, 1) > day).unwrap_or(12);
        (year, month, (day - day_of_year(year, month, 1) + 1) as u32)
    }
}

/// What a directive stands for.
enum Field {
    Text(String),
    /// A number of at least so many digits, filled up with a character.
    Number(i64, usize, char),
}

impl Field {
    /// The text of the field with the flags of glibc: `-` fills nothing up, `_` and `0` choose what with,
    /// `^` is upper case, `#` the other case.
    fn text(self, flags: &str, width: Option<usize>) -> String {
        let mut fill = None;
        let (mut is_upper, mut is_swapped) = (false, false);
        for flag in flags.chars() {
            match flag {
                '-' => fill = Some(None),
                '_' => fill = Some(Some(' ')),
                '0' => fill = Some(Some('0')),
                '^' => is_upper = true,
                _ => is_swapped = true,
            }
        }
        let (text, least, own) = match self {
            Self::Number(n, least, own) => (n.to_string(), least, own),
            Self::Text(text) => (text, 0, ' '),
        };
        let text = match is_upper || is_swapped && text.chars().any(char::is_lowercase) {
            true => text.to_uppercase(),
            false if is_swapped => text.to_lowercase(),
            false => text,
        };
        let fill = fill.unwrap_or(Some(own));
        let least = width.unwrap_or(if fill.is_some() { least } else { 0 });
        let missing = least.saturating_sub(text.chars().count());
        fill.map_or(String::new(), |fill| fill.to_string().repeat(missing)) + &text
    }
}

/// Days from 1970-01-01 to the first of January of `year`.
fn days_before(year: i32) -> i64 {
    let past = i64::from(year) - 1;
    let leap_days = past.div_euclid(4) - past.div_euclid(100) + past.div_euclid(400);
    365 * past + leap_days - 719_162
}

/// Days from the first of January to a day of the same year.
fn day_of_year(year: i32, month: u32, day: u32) -> i64 {
    const BEFORE: [i64; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    BEFORE[month as usize - 1] + i64::from(leap && month > 2) + i64::from(day) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_of_known_dates() {
        for ((year, month, day), days, weekday) in [
            ((1970, 1, 1), 0, "Thursday"),
            ((2000, 2, 29), 11_016, "Tuesday"),
            ((2024, 7, 26), 19_930, "Friday"),
            ((2100, 3, 1), 47_541, "Monday"),
            ((1969, 12, 31), -1, "Wednesday"),
        ] {
            let date = Date::new(year, month, day).unwrap();
            assert_eq!((date.days, date.civil()), (days, (year, month, day)));
            assert_eq!(date.strftime("%A"), weekday);
        }
        assert!(Date::new(2023, 2, 29).is_none() && Date::new(2023, 13, 1).is_none());
    }

    #[test]
    fn every_day_comes_after_the_one_before() {
        let mut last = Date { days: -1000, seconds: 0, micros: 0 }.civil();
        for days in -999..60_000 {
            let civil = Date { days, seconds: 0, micros: 0 }.civil();
            assert!(civil > last, "{civil:?} after {last:?}");
            assert_eq!(Date::new(civil.0, civil.1, civil.2).map(|date| date.days), Some(days));
            last = civil;
        }
    }

    #[test]
    fn directives() {
        let date = Date { seconds: 13 * 3600 + 5 * 60 + 9, ..Date::new(2024, 7, 6).unwrap() };
        let all = date.strftime("%a %b %B %d %H %I %j %m %M %p %S %y %Y 100%%");
        assert_eq!(all, "Sat Jul July 06 13 01 188 07 05 PM 09 24 2024 100%");
        // As Python's `datetime(2024, 7, 6, 13, 5, 9).strftime` gives them on Linux.
        let more =
            date.strftime("%-d|%e|%F|%x|%X|%c|%-m|%-I|%k|%l|%P|%D|%T|%R|%r|%^b|%#p|%_m|%05d");
        let expected = "6| 6|2024-07-06|07/06/24|13:05:09|Sat Jul  6 13:05:09 2024|7|1|13| 1|pm|\
                        07/06/24|13:05:09|13:05|01:05:09 PM|JUL|pm| 7|00006";
        assert_eq!(more, expected);
        assert_eq!(
            date.strftime("%C %f %g %G %u %U %V %w %W %z%Z."),
            "20 000000 24 2024 6 26 27 6 27 ."
        );
        let new_year = Date::new(2021, 1, 3).unwrap();
        assert_eq!(new_year.strftime("%G-W%V-%u %U %W"), "2020-W53-7 01 00");
        assert_eq!(date.strftime("%Q %-:"), "%Q %-:");
        assert_eq!(date.strftime("50%"), "50%");
    }
}
