//! The eBPF program, instruction by instruction: it is short, and needs no compiler on anybody's machine.
//!
//! The kernel calls it at the turns of each TCP connection (`enum` of `BPF_SOCK_OPS_*` in `include/uapi/linux/bpf.h`):
//!
//! | turn | what it does, for a socket that is marked |
//! | --- | --- |
//! | about to connect, or listening | asks to be called when headers are made |
//! | how long will the options of this segment be | for a SYN, and for the SYN-ACK to a SYN with the option: reserves six bytes |
//! | write the options | writes the option |
//! | established | asks to be called no more; of a client notes whether the SYN-ACK had the option |

use std::os::fd::{AsRawFd, BorrowedFd};

/// `struct bpf_insn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Instruction {
    code: u8,
    /// Destination in the lower half, source in the upper one.
    registers: u8,
    offset: i16,
    value: i32,
}

/// The option: kind, length, and what tells it from other experiments.
const OPTION: [u8; 8] = [254, 6, 0xe2, 0xd4, 0xc3, 0xd9, 0, 0];
const OPTION_LEN: i32 = 6;

/// Turns.
const CONNECT: i32 = 3;
const ACTIVE_ESTABLISHED: i32 = 4;
const PASSIVE_ESTABLISHED: i32 = 5;
const LISTEN: i32 = 11;
const OPTIONS_LEN: i32 = 14;
const WRITE_OPTIONS: i32 = 15;

/// Functions of the kernel.
const SET_FLAGS: i32 = 59;
const STORAGE_GET: i32 = 107;
const LOAD_OPTION: i32 = 142;
const STORE_OPTION: i32 = 143;
const RESERVE_OPTION: i32 = 144;

/// Fields of `struct bpf_sock_ops`.
const TURN: i16 = 0;
const FLAGS: i16 = 84;
const SOCKET: i16 = 184;
const TCP_FLAGS: i16 = 212;

/// Wants to be called when headers are made.
const WANTS_HEADERS: i32 = 1 << 6;
/// Look in the SYN, and not in the segment at hand.
const IN_SYN: i32 = 1;
const SYN: i32 = 2;
const ACK: i32 = 16;

/// Where the option lies on the stack.
const BUFFER: i16 = -8;
const STACK: u8 = 10;

/// Places to jump to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Label {
    Marked,
    Established,
    Len,
    Reserve,
    Write,
    Out,
}

#[derive(Default)]
struct Assembler {
    done: Vec<Instruction>,
    jumps: Vec<(usize, Label)>,
    labels: Vec<(Label, usize)>,
}

impl Assembler {
    fn put(&mut self, code: u8, to: u8, from: u8, offset: i16, value: i32) {
        self.done.push(Instruction { code, registers: to | from << 4, offset, value });
    }

    fn copy(&mut self, to: u8, from: u8) {
        self.put(0xbf, to, from, 0, 0);
    }

    fn set(&mut self, to: u8, value: i32) {
        self.put(0xb7, to, 0, 0, value);
    }

    fn add(&mut self, to: u8, value: i32) {
        self.put(0x07, to, 0, 0, value);
    }

    fn or(&mut self, to: u8, value: i32) {
        self.put(0x47, to, 0, 0, value);
    }

    fn and(&mut self, to: u8, value: i32) {
        self.put(0x57, to, 0, 0, value);
    }

    fn load_u32(&mut self, to: u8, from: u8, offset: i16) {
        self.put(0x61, to, from, offset, 0);
    }

    fn load_u64(&mut self, to: u8, from: u8, offset: i16) {
        self.put(0x79, to, from, offset, 0);
    }

    fn store_u32(&mut self, to: u8, offset: i16, value: i32) {
        self.put(0x62, to, 0, offset, value);
    }

    /// The address of a map, in two instructions.
    fn load_map(&mut self, to: u8, map: BorrowedFd<'_>) {
        self.put(0x18, to, 1, 0, map.as_raw_fd());
        self.put(0, 0, 0, 0, 0);
    }

    fn call(&mut self, function: i32) {
        self.put(0x85, 0, 0, 0, function);
    }

    fn jump(&mut self, code: u8, register: u8, value: i32, label: Label) {
        self.jumps.push((self.done.len(), label));
        self.put(code, register, 0, 0, value);
    }

    fn go(&mut self, label: Label) {
        self.jump(0x05, 0, 0, label);
    }

    fn if_equal(&mut self, register: u8, value: i32, label: Label) {
        self.jump(0x15, register, value, label);
    }

    fn if_not_equal(&mut self, register: u8, value: i32, label: Label) {
        self.jump(0x55, register, value, label);
    }

    fn if_negative(&mut self, register: u8, label: Label) {
        self.jump(0xc5, register, 0, label);
    }

    fn label(&mut self, label: Label) {
        self.labels.push((label, self.done.len()));
    }

    /// Puts the option into the buffer.
    fn option(&mut self) {
        let word = |at: usize| i32::from_ne_bytes([0, 1, 2, 3].map(|i| OPTION[at + i]));
        self.store_u32(STACK, BUFFER, word(0));
        self.store_u32(STACK, BUFFER + 4, word(4));
    }

    /// Calls one of the functions that take an option in the buffer: call of the program, buffer, length, flags.
    fn call_with_option(&mut self, function: i32, flags: i32) {
        self.copy(1, 6);
        self.copy(2, STACK);
        self.add(2, BUFFER.into());
        self.set(3, OPTION_LEN);
        self.set(4, flags);
        self.call(function);
    }

    fn finish(mut self) -> Vec<Instruction> {
        for (at, label) in self.jumps {
            let to = self.labels.iter().find(|(other, _)| *other == label).map_or(at, |(_, to)| *to);
            self.done[at].offset = (to as isize - at as isize - 1) as i16;
        }
        self.done
    }
}

/// The program, with this map.
pub(crate) fn program(map: BorrowedFd<'_>) -> Vec<Instruction> {
    let mut a = Assembler::default();
    // 6: what it was called with, 7: the turn, 8: what the map says of the socket.
    a.copy(6, 1);
    a.option();
    a.load_u32(7, 6, TURN);
    a.if_equal(7, OPTIONS_LEN, Label::Len);
    a.if_equal(7, WRITE_OPTIONS, Label::Write);
    for turn in [CONNECT, LISTEN, ACTIVE_ESTABLISHED, PASSIVE_ESTABLISHED] {
        a.if_equal(7, turn, Label::Marked);
    }
    a.go(Label::Out);

    a.label(Label::Marked);
    a.load_u64(2, 6, SOCKET);
    a.if_equal(2, 0, Label::Out);
    a.load_map(1, map);
    a.set(3, 0);
    a.set(4, 0);
    a.call(STORAGE_GET);
    a.if_equal(0, 0, Label::Out);
    a.copy(8, 0);
    a.copy(1, 6);
    a.load_u32(2, 6, FLAGS);
    a.if_equal(7, ACTIVE_ESTABLISHED, Label::Established);
    a.if_equal(7, PASSIVE_ESTABLISHED, Label::Established);
    a.or(2, WANTS_HEADERS);
    a.call(SET_FLAGS);
    a.go(Label::Out);

    a.label(Label::Established);
    a.and(2, !WANTS_HEADERS);
    a.call(SET_FLAGS);
    a.if_not_equal(7, ACTIVE_ESTABLISHED, Label::Out);
    a.call_with_option(LOAD_OPTION, 0);
    a.if_negative(0, Label::Out);
    a.store_u32(8, 0, crate::HEARD as i32);
    a.go(Label::Out);

    a.label(Label::Len);
    a.load_u32(2, 6, TCP_FLAGS);
    a.and(2, SYN | ACK);
    a.if_equal(2, SYN, Label::Reserve);
    a.if_not_equal(2, SYN | ACK, Label::Out);
    a.call_with_option(LOAD_OPTION, IN_SYN);
    a.if_negative(0, Label::Out);
    a.label(Label::Reserve);
    a.copy(1, 6);
    a.set(2, OPTION_LEN);
    a.set(3, 0);
    a.call(RESERVE_OPTION);
    a.go(Label::Out);

    // Only where room was reserved.
    a.label(Label::Write);
    a.call_with_option(STORE_OPTION, 0);

    a.label(Label::Out);
    a.set(0, 1);
    a.put(0x95, 0, 0, 0, 0);
    a.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn every_jump_goes_forward_to_an_instruction() {
        let file = std::fs::File::open("/dev/null").expect("it is there");
        let program = program(file.as_fd());
        let ends = program.len() as i16;
        for (at, instruction) in program.iter().enumerate() {
            let is_jump = instruction.code & 7 == 5 && !matches!(instruction.code, 0x85 | 0x95);
            let to = at as i16 + 1 + instruction.offset;
            assert!(!is_jump || (instruction.offset >= 0 && to < ends), "{at}: {instruction:?}");
        }
        assert_eq!(program.last().map(|last| last.code), Some(0x95));
    }
}
