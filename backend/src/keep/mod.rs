//! A daemon that can be replaced under its devices (`docs/architecture.md`).
//!
//! Two processes: the *keeper*, which holds duplicates of every descriptor that must not be closed and does nothing while a
//! worker lives, and the *worker*, the daemon proper. What is no descriptor is in the [`book`], which is one, too. A worker
//! that finds a book goes on where the one that wrote it ended.

pub mod book;
pub mod exact;
pub mod keeper;
pub mod link;
pub(crate) mod record;

use crate::pool::ranges::Ranges;
use crate::socket::Socket;
use book::{Book, BookError};
use dmbridge_proto::shm::CopyPlan;
use exact::Outlet;
use link::Link;
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Numbers of the descriptors that every worker has.
pub(crate) const BOOK: u64 = 1;
pub(crate) const OUTLET_READ: u64 = 2;
pub(crate) const OUTLET_WRITE: u64 = 3;
/// The first number of all others.
const FIRST: u64 = 16;

static NEXT_NUMBER: AtomicU64 = AtomicU64::new(FIRST);

/// A number for a descriptor, by which the keeper has it: no two descriptors of a daemon ever have the same.
pub fn number() -> u64 {
    NEXT_NUMBER.fetch_add(1, Ordering::Relaxed)
}

/// Why a worker cannot go on where another ended.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// The book.
    #[error(transparent)]
    Book(#[from] BookError),
    /// The keeper.
    #[error("the keeper cannot be reached: {0}")]
    Link(#[from] io::Error),
    /// An entry of the book.
    #[error("the book's entry {0} is not understood: {1}")]
    Entry(String, String),
}

/// What a worker has of the keeper.
#[derive(Debug)]
pub struct Kept {
    /// The book.
    pub book: Book,
    /// The way out of what must be sent exactly once.
    pub outlet: Outlet,
    link: Link,
    /// How many entries of the book name a descriptor that the keeper has.
    uses: HashMap<u64, u32>,
    /// The descriptors that an entry names.
    of_entry: HashMap<String, Vec<u64>>,
    /// Descriptors that no entry names from the next commit on.
    dropped: Vec<u64>,
    /// Cells that are free.
    cells: Ranges,
}

/// What a keeper had for this worker: descriptors, by number.
#[derive(Debug)]
pub struct Heirs {
    descriptors: HashMap<u64, OwnedFd>,
    /// Whether another worker was here before.
    pub is_old: bool,
}

impl Heirs {
    /// The descriptor with this number.
    pub fn take(&self, number: u64) -> Result<OwnedFd, KeepError> {
        let found = self.descriptors.get(&number).map(OwnedFd::try_clone);
        found.ok_or(BookError::Damaged("a descriptor that it names is missing"))?.map_err(KeepError::Link)
    }

    /// The numbers of all.
    pub fn numbers(&self) -> impl Iterator<Item = u64> {
        self.descriptors.keys().copied()
    }
}

/// An entry as it is written down.
pub(crate) fn text(entry: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(entry).expect("the entries have no maps with odd keys, and no numbers that are none")
}

impl Kept {
    /// Takes over from the keeper at the other end of a socket.
    pub fn take_over(socket: OwnedFd) -> Result<(Kept, Heirs), KeepError> {
        let link = Link::new(socket);
        let mut descriptors = link.receive_all()?;
        let highest = descriptors.keys().max().copied().unwrap_or(0).max(FIRST - 1);
        NEXT_NUMBER.fetch_max(highest + 1, Ordering::Relaxed);
        let is_old = descriptors.contains_key(&BOOK);
        let (book, outlet) = if is_old {
            let mut take =
                |number| descriptors.remove(&number).ok_or(BookError::Damaged("its pipe is missing"));
            (Book::open(take(BOOK)?)?, Outlet::from_pipe(take(OUTLET_READ)?, take(OUTLET_WRITE)?))
        } else {
            let (book, outlet) = (Book::new().map_err(BookError::Io)?, Outlet::new()?);
            let (read, write) = outlet.pipe();
            link.keep(OUTLET_READ, read)?;
            link.keep(OUTLET_WRITE, write)?;
            // The last: where there is a book there is everything.
            link.keep(BOOK, book.as_fd())?;
            (book, outlet)
        };
        let kept = Kept {
            book,
            outlet,
            link,
            uses: HashMap::new(),
            of_entry: HashMap::new(),
            dropped: Vec::new(),
            cells: Ranges::new(0, book::MAX_CELLS.into()),
        };
        Ok((kept, Heirs { descriptors, is_old }))
    }

    /// The socket at this path that another worker made, if it is still the one there.
    pub fn listener(&self, path: &Path, heirs: &Heirs) -> Option<Socket> {
        let wanted = format!("listener/{}", path.display());
        let (_, entry) = self.book.values().find(|(name, _)| *name == wanted)?;
        let entry: record::Listener = serde_json::from_slice(entry).ok()?;
        let listener = heirs.take(entry.fd).ok()?.into();
        Socket::adopt(path, listener, (entry.device, entry.inode), entry.fd)
    }

    /// How memory was written best when another worker last looked.
    pub fn copy_plan(&self) -> Option<CopyPlan> {
        let (_, entry) = self.book.values().find(|(name, _)| *name == "global")?;
        let entry: record::Global = serde_json::from_slice(entry).ok()?;
        Some(CopyPlan::from_bytes(entry.copy_plan))
    }

    /// An entry of the book that was there already names these descriptors.
    pub fn adopt(&mut self, name: &str, numbers: Vec<u64>) {
        for number in &numbers {
            *self.uses.entry(*number).or_default() += 1;
        }
        self.of_entry.insert(name.into(), numbers);
    }

    /// The keeper drops what it had and no entry names.
    pub fn drop_unnamed(&mut self, numbers: impl Iterator<Item = u64>) {
        for number in numbers {
            if !self.uses.contains_key(&number) {
                self.link.drop(number);
            }
        }
    }

    /// From the next commit on, this is an entry of the book, and the keeper has the descriptors that it names.
    pub fn put(&mut self, name: &str, value: &[u8], descriptors: &[(u64, BorrowedFd<'_>)]) {
        for (number, fd) in descriptors {
            let uses = self.uses.entry(*number).or_default();
            *uses += 1;
            if *uses == 1
                && let Err(error) = self.link.keep(*number, *fd)
            {
                tracing::error!("the keeper does not take a descriptor: {error}");
            }
        }
        let numbers = descriptors.iter().map(|(number, _)| *number).collect::<Vec<_>>();
        let old = if numbers.is_empty() {
            self.of_entry.remove(name)
        } else {
            self.of_entry.insert(name.into(), numbers)
        };
        self.unuse(old);
        self.book.put(name, value);
    }

    /// From the next commit on, there is no such entry.
    pub fn remove(&mut self, name: &str) {
        let old = self.of_entry.remove(name);
        self.unuse(old);
        self.book.remove(name);
    }

    fn unuse(&mut self, numbers: Option<Vec<u64>>) {
        for number in numbers.into_iter().flatten() {
            if let Some(uses) = self.uses.get_mut(&number) {
                *uses -= 1;
                if *uses == 0 {
                    self.uses.remove(&number);
                    self.dropped.push(number);
                }
            }
        }
    }

    /// Everything that was put and removed counts, at once.
    pub fn commit(&mut self) {
        self.book.commit();
        for number in std::mem::take(&mut self.dropped) {
            if !self.uses.contains_key(&number) {
                self.link.drop(number);
            }
        }
    }

    /// Tells the keeper that this worker serves.
    pub fn ready(&self) {
        self.link.ready();
    }

    /// Takes so many cells that follow each other, and are zero; none if there are no more.
    pub fn take_cells(&mut self, count: u32) -> Option<u32> {
        let first = u32::try_from(self.cells.take(count.into())?).ok()?;
        for cell in first..first + count {
            self.book.cell(cell).word().store(0, Ordering::Relaxed);
        }
        Some(first)
    }

    /// Another worker took these cells. False if they are not free.
    pub fn adopt_cells(&mut self, first: u32, count: u32) -> bool {
        self.cells.take_at(first.into(), count.into())
    }

    /// Gives cells back.
    pub fn give_cells(&mut self, first: u32, count: u32) {
        self.cells.give(first.into(), count.into());
    }
}
