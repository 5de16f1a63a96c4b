//! A session, its last command and its backend channel, as the book has them ([`record`]).

use crate::fabric::Attempt;
use crate::frontend::{Channel, Manner, MapRequest, Part, Stage};
use crate::keep::record;
use crate::memory::{DeviceMemory, RegionInfo};
use crate::pool::memfile::{Borrower, MemFile};
use crate::session::{Answer, KeptSession, Origin, Ring, Service, Session, Suspended};
use crate::vring::Piece;
use dmbridge_proto::status::Status;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// A device's regions as they are written down. Of those that are extents the keeper has the daemon's own description of the
/// file: the front-end's one tells by a lock whether it still has the mapping.
pub(super) fn regions<'a>(
    memory: &'a DeviceMemory,
    files: &[&'a Arc<MemFile>],
    descriptors: &mut Vec<(u64, BorrowedFd<'a>)>,
) -> Vec<record::Region> {
    let region = |(info, file, number): (RegionInfo, &'a File, u64)| {
        let own = files.iter().find(|own| own.is(file));
        let (number, fd) = own.map_or((number, file.as_fd()), |own| (own.number(), own.fd()));
        descriptors.push((number, fd));
        record::Region {
            guest_addr: info.guest_addr,
            size: info.size,
            user_addr: info.user_addr,
            file_offset: info.file_offset,
            fd: number,
        }
    };
    memory.regions().map(region).collect()
}

pub(super) fn session_record(
    session: &Session,
    kept: &KeptSession,
    regions: Vec<record::Region>,
    starting: impl Fn(usize) -> bool,
) -> record::Session {
    let ring = |(index, ring): (usize, &Ring)| record::Ring {
        size: ring.size,
        addresses: ring.addresses,
        base: ring.base,
        enabled: ring.enabled,
        kick: ring.kick.as_ref().map(|kick| kick.number),
        call: ring.call.as_ref().map(|file| file.number()),
        err: ring.err.as_ref().map(|file| file.number()),
        service: match ring.service {
            Service::None if starting(index) => record::Service::Served,
            Service::None => record::Service::None,
            Service::Broken => record::Service::Broken,
            Service::Control(_) | Service::Event | Service::Move(..) => record::Service::Served,
        },
    };
    record::Session {
        socket: kept.number,
        name: session.name.to_string(),
        group: session.group.to_string(),
        hub: session.origin == Origin::Hub,
        gid: session.gid.to_bytes(),
        limits: session.limits,
        features: session.features,
        protocol: session.protocol.bits(),
        owned: session.owned,
        hasty: session.hasty,
        copy_plan: session.copy_plan.to_bytes(),
        first_cell: kept.first_cell,
        rings: session.rings.iter().enumerate().map(ring).collect(),
        regions,
        device: session.device.map(|device| device.0),
        paused: session
            .paused
            .as_ref()
            .map(|paused| record::Paused { bases: paused.bases.clone(), features: paused.features }),
    }
}

pub(super) fn command_record(session: &Session) -> record::Command {
    let pieces = |pieces: &[Piece]| pieces.iter().map(|piece| (piece.addr, piece.len)).collect();
    let suspended = |suspended: &Suspended| record::Suspended {
        request: suspended.request.clone(),
        head: suspended.head,
        writable: pieces(&suspended.writable),
        answer: suspended.answer.map(|attempt| match attempt {
            Attempt::First | Attempt::After(Ok(())) => 0,
            Attempt::After(Err(status)) => Status::to_byte::<()>(&Err(status)),
        }),
    };
    let answer = |answer: &Answer| record::Answer {
        used: answer.used,
        head: answer.chain.head,
        writable: pieces(&answer.chain.writable),
        response: answer.response.clone(),
    };
    record::Command {
        suspended: session.suspended.as_ref().map(suspended),
        answer: session.answer.as_ref().map(answer),
    }
}

fn map_record(request: &MapRequest) -> record::MapRequest {
    record::MapRequest {
        device: request.device.0,
        extent: request.extent.get(),
        map: request.file.is_some(),
        owner: request.file.as_ref().is_some_and(|(_, borrower)| *borrower == Borrower::Owner),
        offset: request.offset,
        len: request.len,
    }
}

pub(super) fn channel_record(channel: &Channel) -> record::Channel {
    record::Channel {
        fd: channel.number,
        guarded: channel.manner == Manner::Guarded,
        open: channel.open,
        queue: channel.queue.iter().map(map_record).collect(),
        pending: channel.pending.as_ref().map(|pending| record::Pending {
            request: map_record(&pending.request),
            stage: match pending.stage {
                Stage::Begun => record::Stage::Begun,
                Stage::Asked => record::Stage::Asked,
                Stage::Settling => record::Stage::Settling,
            },
            abandoned: pending.abandoned,
            overdue: pending.overdue,
        }),
        outbox: channel.outbox.iter().map(part_record).collect(),
    }
}

fn part_record(part: &Part) -> record::Part {
    record::Part { bytes: part.bytes.clone(), file: part.file }
}
