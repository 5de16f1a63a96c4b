//! The book: what a worker knows and the next one has to know, in memory that outlives it. Only names and values, and the
//! order in which they count; what they say is in `record`.
//!
//! A log in a memfd: each record puts or removes the value of a name. What was appended counts from the moment
//! at which one aligned word, the length of the log, says so: whenever the worker dies, the book says what held
//! after one of its steps, never half of one. When most of a log is out of date, what holds is written into the other of two
//! areas, and again one word makes that the valid one.
//!
//! Beside the log there are *cells* of 64 bytes, for what other threads note at every event or move: a word that is stored.

use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// What the file is called, for people who look into `/proc`.
const NAME: &str = "dmbridge-book";
const MAGIC: u64 = u64::from_le_bytes(*b"DMBRBOOK");
/// Of the layout and of the records. A worker reads no book of another version.
pub const VERSION: u64 = 1;

const PAGE: u64 = 4096;
/// Bytes of each of the two areas: address space, of which pages exist as they are written.
const AREA: u64 = 16 << 30;
/// The log in an area starts after its length.
const LOG: u64 = 64;
const CELLS: u64 = PAGE + 2 * AREA;
/// The most cells: a device has one for its events and one for each move queue.
pub const MAX_CELLS: u32 = 1 << 20;
const CELL_SIZE: u64 = 64;
const SIZE: u64 = CELLS + MAX_CELLS as u64 * CELL_SIZE;

/// Offsets in the first page.
const AT_MAGIC: u64 = 0;
const AT_VERSION: u64 = 8;
const AT_ACTIVE: u64 = 16;

/// Length and check, of a record: its size, the length of its name, whether it removes, its check.
const RECORD_HEADER: usize = 16;
/// The longest name, in bytes.
const MAX_NAME: usize = u16::MAX as usize;
/// A log is not written anew before it has so many bytes.
const LEAST_REWRITE: u64 = 1 << 20;

/// Why a book cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BookError {
    /// The system refused.
    #[error("the book cannot be used: {0}")]
    Io(#[from] io::Error),
    /// Another program's, or of another version of this one.
    #[error(
        "the book is of version {0}, and this program reads version {VERSION} only: start the version that wrote it"
    )]
    Version(u64),
    /// Something that no worker writes.
    #[error("the book is damaged: {0}")]
    Damaged(&'static str),
}

#[derive(Debug)]
struct Mapping {
    start: *mut u8,
}

// SAFETY: the mapping lives as long as the value; the log is accessed by the book's owner only, all else by atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn of(file: &File) -> io::Result<Mapping> {
        // SAFETY: a new mapping of a file of `SIZE` bytes that cannot shrink.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                SIZE as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        for advice in [libc::MADV_DONTDUMP, libc::MADV_DONTFORK] {
            // SAFETY: the range is the mapping that was just made; the advice changes no content.
            unsafe { libc::madvise(start, SIZE as usize, advice) };
        }
        Ok(Mapping { start: start.cast() })
    }

    fn word(&self, at: u64) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at < SIZE, "outside of the book");
        // SAFETY: aligned and mapped, as checked, and only ever accessed by atomics.
        unsafe { AtomicU64::from_ptr(self.start.wrapping_add(at as usize).cast()) }
    }

    /// # Safety
    ///
    /// The bytes are of a log, inside of its area, and nobody writes them meanwhile.
    unsafe fn bytes(&self, at: u64, len: usize) -> &[u8] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(self.start.wrapping_add(at as usize), len) }
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        assert!(at + bytes.len() as u64 <= CELLS, "outside of the book");
        // SAFETY: mapped, as checked, and of a log, which nobody but its one owner accesses.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.wrapping_add(at as usize), bytes.len());
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `of`; nobody holds an address beyond the life of the value.
        unsafe { libc::munmap(self.start.cast(), SIZE as usize) };
    }
}

/// 64 bytes of the book that another thread writes: a word, and some bytes that belong to it.
#[derive(Debug, Clone)]
pub struct Cell {
    mapping: Arc<Mapping>,
    at: u64,
}

impl Cell {
    /// The word.
    pub fn word(&self) -> &AtomicU64 {
        self.mapping.word(self.at)
    }

    /// One of the 56 bytes after it.
    pub fn byte(&self, number: usize) -> &AtomicU8 {
        assert!(number < CELL_SIZE as usize - 8);
        // SAFETY: inside of the cell, and only ever accessed by atomics.
        unsafe { AtomicU8::from_ptr(self.mapping.start.wrapping_add(self.at as usize + 8 + number)) }
    }
}

/// A book that is being written.
#[derive(Debug)]
pub struct Book {
    file: File,
    mapping: Arc<Mapping>,
    /// Which of the areas counts.
    active: u64,
    /// Bytes of the log, with those that do not count yet.
    len: u64,
    /// Bytes of the log that count.
    committed: u64,
    /// What holds, with what does not count yet.
    values: HashMap<Box<str>, Box<[u8]>>,
    /// Bytes that the log would have if it said only what holds.
    live: u64,
}

impl Book {
    /// An empty book.
    pub fn new() -> io::Result<Book> {
        let fd = memfd_create(NAME, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        let file = File::from(fd);
        file.set_len(SIZE)?;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals()))?;
        let mapping = Arc::new(Mapping::of(&file)?);
        mapping.word(AT_VERSION).store(VERSION, Ordering::Relaxed);
        mapping.word(AT_MAGIC).store(MAGIC, Ordering::Release);
        Ok(Book { file, mapping, active: 0, len: 0, committed: 0, values: HashMap::new(), live: 0 })
    }

    /// The book that another worker has written.
    pub fn open(fd: OwnedFd) -> Result<Book, BookError> {
        let file = File::from(fd);
        let sealed = fcntl(&file, FcntlArg::F_GET_SEALS).map_err(io::Error::from)?;
        if !SealFlag::from_bits_truncate(sealed).contains(seals()) || file.metadata()?.len() != SIZE {
            // Of another size or kind: another version's.
            return Err(BookError::Version(0));
        }
        let mapping = Arc::new(Mapping::of(&file)?);
        if mapping.word(AT_MAGIC).load(Ordering::Acquire) != MAGIC {
            return Err(BookError::Damaged("it does not start like one"));
        }
        let version = mapping.word(AT_VERSION).load(Ordering::Relaxed);
        if version != VERSION {
            return Err(BookError::Version(version));
        }
        let active = mapping.word(AT_ACTIVE).load(Ordering::Acquire);
        if active > 1 {
            return Err(BookError::Damaged("it says that a third area counts"));
        }
        let committed = mapping.word(area(active)).load(Ordering::Acquire);
        if committed > AREA - LOG {
            return Err(BookError::Damaged("its log is longer than its area"));
        }
        let mut book =
            Book { file, mapping, active, len: committed, committed, values: HashMap::new(), live: 0 };
        book.read()?;
        Ok(book)
    }

    fn read(&mut self) -> Result<(), BookError> {
        let mapping = self.mapping.clone();
        let start = area(self.active) + LOG;
        let mut at = 0;
        while at < self.committed {
            let left = (self.committed - at) as usize;
            // SAFETY: inside of the area: `committed` was checked against it. The one who wrote it is dead.
            let log = unsafe { mapping.bytes(start + at, left) };
            let record = Record::parse(log)?;
            match record.value {
                Some(value) => self.set(record.name, value),
                None => self.unset(record.name),
            }
            at += record.size as u64;
        }
        Ok(())
    }

    fn set(&mut self, name: &str, value: &[u8]) {
        self.live += size_of_record(name, value.len());
        if let Some(old) = self.values.insert(name.into(), value.into()) {
            self.live -= size_of_record(name, old.len());
        }
    }

    fn unset(&mut self, name: &str) {
        if let Some(old) = self.values.remove(name) {
            self.live -= size_of_record(name, old.len());
        }
    }

    /// All that holds, in no order.
    pub fn values(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.values.iter().map(|(name, value)| (&**name, &**value))
    }

    /// From the next [`commit`](Self::commit) on, this is the value of that name.
    pub fn put(&mut self, name: &str, value: &[u8]) {
        if self.values.get(name).is_some_and(|old| **old == *value) {
            return;
        }
        self.append(name, Some(value));
        self.set(name, value);
    }

    /// From the next [`commit`](Self::commit) on, that name has no value.
    pub fn remove(&mut self, name: &str) {
        if self.values.contains_key(name) {
            self.append(name, None);
            self.unset(name);
        }
    }

    fn append(&mut self, name: &str, value: Option<&[u8]>) {
        let record = Record::emit(name, value);
        // Far from it, see `commit` and `is_nearly_full`.
        assert!(self.len + record.len() as u64 <= AREA - LOG, "the book is full");
        self.mapping.write(area(self.active) + LOG + self.len, &record);
        self.len += record.len() as u64;
    }

    /// Whether so much holds that no more should be promised to anybody.
    pub fn is_nearly_full(&self) -> bool {
        self.live > AREA / 4
    }

    /// Makes everything count that was put and removed since the last time, at once.
    pub fn commit(&mut self) {
        if self.len == self.committed {
            return;
        }
        if self.len > LEAST_REWRITE && (self.len > 4 * self.live || self.len > AREA / 2) {
            return self.rewrite();
        }
        self.mapping.word(area(self.active)).store(self.len, Ordering::Release);
        self.committed = self.len;
    }

    /// Writes what holds into the other area, and makes that the one that counts.
    fn rewrite(&mut self) {
        let (old, new) = (self.active, 1 - self.active);
        let mut len = 0;
        for (name, value) in &self.values {
            let record = Record::emit(name, Some(value));
            self.mapping.write(area(new) + LOG + len, &record);
            len += record.len() as u64;
        }
        self.mapping.word(area(new)).store(len, Ordering::Release);
        self.mapping.word(AT_ACTIVE).store(new, Ordering::Release);
        (self.active, self.len, self.committed) = (new, len, len);
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        // Only memory: the next log there is as good without.
        let _ = fallocate(&self.file, punch, area(old) as i64, AREA as i64);
    }

    /// A cell, below [`MAX_CELLS`].
    pub fn cell(&self, number: u32) -> Cell {
        assert!(number < MAX_CELLS);
        Cell { mapping: self.mapping.clone(), at: CELLS + u64::from(number) * CELL_SIZE }
    }
}

impl AsFd for Book {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn seals() -> SealFlag {
    SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL
}

fn area(number: u64) -> u64 {
    PAGE + number * AREA
}

fn size_of_record(name: &str, value: usize) -> u64 {
    (RECORD_HEADER + name.len() + value).next_multiple_of(8) as u64
}

/// A record as it lies in the log.
struct Record<'a> {
    name: &'a str,
    value: Option<&'a [u8]>,
    size: usize,
}

impl Record<'_> {
    fn emit(name: &str, value: Option<&[u8]>) -> Vec<u8> {
        assert!(name.len() <= MAX_NAME, "a name of the book is too long");
        let bytes = value.unwrap_or_default();
        let mut record = Vec::with_capacity(RECORD_HEADER + name.len() + bytes.len() + 8);
        record.extend(u32::try_from(bytes.len()).expect("a value is short").to_le_bytes());
        record.extend((name.len() as u16).to_le_bytes());
        record.extend(u16::from(value.is_none()).to_le_bytes());
        record.extend(check(name, bytes, value.is_none()).to_le_bytes());
        record.extend(name.as_bytes());
        record.extend(bytes);
        record.resize(record.len().next_multiple_of(8), 0);
        record
    }

    fn parse(log: &[u8]) -> Result<Record<'_>, BookError> {
        let short = BookError::Damaged("a record is longer than its log");
        let (header, rest) = log.split_first_chunk::<RECORD_HEADER>().ok_or(short)?;
        let value_len = u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let name_len = usize::from(u16::from_le_bytes([header[4], header[5]]));
        let removes = u16::from_le_bytes([header[6], header[7]]);
        let sum = u64::from_le_bytes(std::array::from_fn(|at| header[8 + at]));
        let size = (RECORD_HEADER + name_len + value_len).next_multiple_of(8);
        if removes > 1 || size > log.len() {
            return Err(BookError::Damaged("a record is longer than its log"));
        }
        let name = std::str::from_utf8(&rest[..name_len])
            .map_err(|_| BookError::Damaged("a record's name is no text"))?;
        let value = &rest[name_len..name_len + value_len];
        if check(name, value, removes == 1) != sum {
            return Err(BookError::Damaged("a record is not what was written"));
        }
        Ok(Record { name, value: (removes == 0).then_some(value), size })
    }
}

/// FNV-1a: against bugs, not against anybody.
fn check(name: &str, value: &[u8], removes: bool) -> u64 {
    let bytes = name.bytes().chain([u8::from(removes)]).chain(value.iter().copied());
    bytes.fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn reopen(book: &Book) -> Result<Book, BookError> {
        Book::open(book.as_fd().try_clone_to_owned().unwrap())
    }

    fn content(book: &Book) -> BTreeMap<String, Vec<u8>> {
        book.values().map(|(name, value)| (name.into(), value.into())).collect()
    }

    #[test]
    fn what_was_not_committed_never_was() {
        let mut book = Book::new().unwrap();
        book.put("a", b"1");
        book.put("b", b"2");
        book.commit();
        let before = content(&book);
        book.put("a", b"3");
        book.remove("b");
        book.put("c", &[7; 1000]);
        assert_eq!(content(&reopen(&book).unwrap()), before);
        book.commit();
        assert_eq!(content(&reopen(&book).unwrap()), content(&book));
        assert_eq!(content(&book).keys().collect::<Vec<_>>(), ["a", "c"]);
    }

    /// Whenever a worker dies, its book says what held after one of its steps: each is tried with the log cut at every
    /// word that the step wrote, and with what is behind it torn.
    #[test]
    fn a_torn_step_is_no_step() {
        let mut book = Book::new().unwrap();
        let mut state = 1u64;
        for step in 0..200u64 {
            let before = content(&reopen(&book).unwrap());
            for change in 0..3 {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let name = format!("n{}", state >> 60);
                if state & 4 == 0 {
                    book.remove(&name);
                } else {
                    book.put(&name, &vec![step as u8; (state >> 33 & 63) as usize + change]);
                }
                // It dies here.
                assert_eq!(content(&reopen(&book).unwrap()), before);
            }
            let torn = area(book.active) + LOG + book.committed;
            if book.len > book.committed + 8 {
                let saved = book.mapping.word(torn + 8).swap(u64::MAX, Ordering::Relaxed);
                assert_eq!(content(&reopen(&book).unwrap()), before);
                book.mapping.word(torn + 8).store(saved, Ordering::Relaxed);
            }
            book.commit();
            assert_eq!(content(&reopen(&book).unwrap()), content(&book));
        }
    }

    #[test]
    fn a_book_that_is_written_for_ever_stays_small() {
        let mut book = Book::new().unwrap();
        for number in 0..200_000u32 {
            book.put(&format!("n{}", number % 50), &number.to_le_bytes());
            book.commit();
            assert!(book.len <= 2 * LEAST_REWRITE);
        }
        let again = reopen(&book).unwrap();
        assert_eq!(content(&again), content(&book));
        assert_eq!(again.live, book.live);
        assert_eq!(again.values.len(), 50);
    }

    #[test]
    fn a_book_in_which_anything_was_changed_is_refused_or_means_the_same() {
        let mut book = Book::new().unwrap();
        for number in 0..20u8 {
            book.put(&format!("name{number}"), &[number; 40]);
        }
        book.commit();
        let whole = content(&book);
        let mut refused = 0;
        for at in (0..book.committed).step_by(8) {
            for flip in [1u64, 1 << 20, 1 << 47, u64::MAX] {
                let word = book.mapping.word(area(0) + LOG + at);
                word.fetch_xor(flip, Ordering::Relaxed);
                match reopen(&book) {
                    // Between two records.
                    Ok(other) => assert_eq!(content(&other), whole),
                    Err(_) => refused += 1,
                }
                word.fetch_xor(flip, Ordering::Relaxed);
            }
        }
        assert!(refused > 100);
        for len in [book.committed - 8, 8, u64::MAX, AREA] {
            book.mapping.word(area(0)).store(len, Ordering::Relaxed);
            assert!(reopen(&book).is_err(), "{len}");
        }
    }

    #[test]
    fn a_book_of_another_version_is_not_read() {
        let book = Book::new().unwrap();
        book.mapping.word(AT_VERSION).store(VERSION + 1, Ordering::Relaxed);
        assert!(matches!(reopen(&book), Err(BookError::Version(version)) if version == VERSION + 1));
        let file = memfd_create(NAME, MFdFlags::MFD_CLOEXEC).unwrap();
        assert!(matches!(Book::open(file), Err(BookError::Version(0))));
    }

    #[test]
    fn a_cell_outlives_who_wrote_it() {
        let book = Book::new().unwrap();
        let cell = book.cell(MAX_CELLS - 1);
        cell.word().store(77, Ordering::Release);
        cell.byte(55).store(5, Ordering::Relaxed);
        let again = reopen(&book).unwrap().cell(MAX_CELLS - 1);
        assert_eq!((again.word().load(Ordering::Acquire), again.byte(55).load(Ordering::Relaxed)), (77, 5));
    }
}
